"""What a ternary weight keeps between steps: the rule it learns by, and how its state is stored."""

from dataclasses import dataclass

from arbitor.errors import UserError

RULES = ("latent", "bigint")
CORRELATION_GROUP = 32  # what `bigint` takes where no group size is given
LARGEST_GROUP = 4096


@dataclass(frozen=True)
class StateFormat:
    """Part of the section `update`; model and optimizer must agree on it."""

    rule: str = "latent"
    group_size: int = 0  # weights of a row that share a scale under `bigint`; 0 = 32

    def validate(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"update.rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        if not 0 <= self.group_size <= LARGEST_GROUP:
            raise UserError(
                f"update.group_size: expected 0 to {LARGEST_GROUP}, got {self.group_size}"
            )

    @property
    def correlation_group(self) -> int:
        """Weights of a row that share a scale under `bigint`."""
        return self.group_size or CORRELATION_GROUP
