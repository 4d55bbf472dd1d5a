"""What a ternary weight keeps between steps: the rule it learns by, and how its state is stored."""

from dataclasses import dataclass

from arbitor.errors import UserError

RULES = ("latent", "bigint")
CORRELATION_GROUP = 8  # what `bigint` takes where no group size is given
LARGEST_GROUP = 4096  # of `bigint`
LATENT_GROUPS = (0, 16, 32, 64)  # a momentum exponent serves whole groups


@dataclass(frozen=True)
class StateFormat:
    """Part of the section `update`; model and optimizer must agree on it."""

    rule: str = "latent"
    momentum_bits: int = 8  # or 4
    latent_bits: int = 8  # or 6
    # Weights of a row that share a scale beside the row's; 0 = none (`latent`) or 8 (`bigint`).
    group_size: int = 0

    def validate(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"update.rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        for name, choices in (("momentum_bits", (8, 4)), ("latent_bits", (8, 6))):
            bits = getattr(self, name)
            if bits not in choices:
                raise UserError(f"update.{name}: expected {choices[0]} or {choices[1]}, got {bits}")
            if self.rule == "bigint" and bits != 8:
                raise UserError(f"update.{name}: the rule bigint has none; leave it away")
        if self.rule == "bigint" and not 0 <= self.group_size <= LARGEST_GROUP:
            raise UserError(
                f"update.group_size: expected 0 to {LARGEST_GROUP} under bigint,"
                f" got {self.group_size}"
            )
        if self.rule == "latent" and self.group_size not in LATENT_GROUPS:
            raise UserError(
                f"update.group_size: expected one of {', '.join(map(str, LATENT_GROUPS))}"
                f" under latent, got {self.group_size}"
            )

    def check_activation(self, activation: str) -> None:
        """Group exponents want an operand with exponents of its own."""
        if self.rule == "latent" and self.group_size and activation == "int8":
            raise UserError(
                f"update.group_size: {self.group_size} does not go with model.activation int8;"
                " set it to 0 or the activation to fp8"
            )

    def state_format(self) -> "StateFormat":
        """This alone, where it is part of a larger configuration."""
        return StateFormat(self.rule, self.momentum_bits, self.latent_bits, self.group_size)

    @property
    def correlation_group(self) -> int:
        """Weights of a row that share a scale under `bigint`."""
        return self.group_size or CORRELATION_GROUP

    @property
    def largest_momentum(self) -> int:
        return (1 << (self.momentum_bits - 1)) - 1

    @property
    def latent_shift(self) -> int:
        """log2 of the step between neighbouring latents."""
        return 8 - self.latent_bits

    @property
    def largest_latent(self) -> int:
        return ((1 << (self.latent_bits - 1)) - 1) << self.latent_shift


INT8 = StateFormat()
