"""Configuration dataclasses from plain data: what is accepted, and what the errors name."""

from dataclasses import asdict, dataclass, field

import pytest

from arbitor.errors import UserError
from arbitor.settings import build, parse_value, read_yaml, write_yaml


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rate: float = 0.5
    points: float | list[list[float]] = 1.0


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)

    def validate(self) -> None:
        if self.name == "bad":
            raise UserError("name: bad")


def test_nested_values_build_and_reload_to_an_equal_object():
    values = {"inner": {"rate": "3e-4"}, "many": {"a": {"points": [[0, 1], [9, 0.5]]}}}
    outer = build(Outer, values)
    assert outer.inner.rate == 3e-4
    assert build(Outer, asdict(outer)) == outer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"innr": {}}, r"innr: unknown configuration key; did you mean inner\?"),
        ({"inner": {"widht": 1}}, r"inner.widht: .* did you mean inner.width\?"),
        ({"many": {"a": {"zzz": 1}}}, r"many.a.zzz: .* known: width, rate, points"),
        ({"inner": {"width": "three"}}, r"inner.width: .* got 'three'"),
        ({"inner": {"rate": float("nan")}}, r"inner.rate: .*finite"),
        ({"inner": 3}, r"inner: expected a section"),
        ({"many": [1]}, r"many: expected a section"),
        ({"name": "bad"}, r"name: bad"),
    ],
)
def test_errors_name_the_key(values, message):
    with pytest.raises(UserError, match=message):
        build(Outer, values)


def test_yaml_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="none.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\n")
    with pytest.raises(UserError, match="broken.yaml: is not valid YAML"):
        read_yaml(broken)
    broken.write_text("- 1\n")
    with pytest.raises(UserError, match="expected `key: value`"):
        read_yaml(broken)
    broken.write_text("")
    assert read_yaml(broken) == {}


def test_yaml_text_reads_back(tmp_path):
    values = {"b": 1, "a": {"c": [1, 2.5], "d": "e"}}
    path = tmp_path / "x.yaml"
    path.write_text(write_yaml(values))
    assert read_yaml(path) == values


def test_values_on_the_command_line_are_yaml():
    assert parse_value("[[0, 1.5]]") == [[0, 1.5]]
    assert parse_value("true") is True
    with pytest.raises(UserError, match="not a YAML value"):
        parse_value("[1")


@dataclass(frozen=True)
class Needy:
    path: str
    inner: Inner
    optional: int = 1


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="some.path: missing"):
        build(Needy, {"inner": {}}, "some")
    with pytest.raises(UserError, match="inner: missing"):
        build(Needy, {"path": "x"})
