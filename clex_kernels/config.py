"""ClexConfig: every setting of CLEX and the only place with defaults."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

# transformers writes the dictionary under either name, and its kind under either key.
_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
_KIND_KEYS = ("rope_type", "type")
# of head_dim, hidden_factor and max_factor: products of them stay below 2^63.
LARGEST_SIZE = 2**20


@dataclass(frozen=True)
class ClexConfig:
    """All settings of CLEX, checked on construction.

    The derived sizes are R = rotary_dim / 2 rotary pairs (`pairs`) and M = hidden_factor * rotary_dim (`hidden_size`).

    Args:
        head_dim: D, channels of one attention head.
        train_length: tokens per sequence the base model was trained with; lengths are measured in it.
        max_factor: largest length factor t (dimensionless) that is trained and used; an integer.
        rotary_dim: rotated channels of a head, even, 4 to head_dim; the others pass through. None: head_dim.
        rope_base: b of the plain RoPE that t = 1 gives, freq_i = b^(-i/R) rad/token.
        ntk_base: n of the NTK term in the ODE. The authors keep 10000 whatever the model's own base is.
        hidden_factor: width of the ODE's hidden layer over rotary_dim (the authors' param_factor).
        activation: of the ODE's hidden layer, "tanh" or "silu".
        step_size: step of the authors' fixed-step solver, in t. Only the reference takes it; the package's own
            solver controls its error instead.
        scale_policy: how a length gives t. "integer": ceil(length / train_length), as the authors do;
            "continuous": length / train_length. Both stay within [1, max_factor].
        log_scale: multiply queries by ln(length) / ln(train_length); "clamped" keeps that factor at 1 or above.

    Raises:
        TypeError: a field has the wrong type (a bool is no number here).
        ValueError: a field is out of range: head_dim, max_factor and hidden_factor go up to 2^20, and
            train_length * max_factor up to 2^53, the last position that fp64 tells apart.
    """

    head_dim: int
    train_length: int
    max_factor: int = 16
    rotary_dim: int | None = None
    rope_base: float = 10000.0
    ntk_base: float = 10000.0
    hidden_factor: int = 1
    activation: Literal["tanh", "silu"] = "tanh"
    step_size: float = 0.01
    scale_policy: Literal["integer", "continuous"] = "integer"
    log_scale: bool | Literal["clamped"] = False

    def __post_init__(self) -> None:
        for name in ("head_dim", "train_length", "max_factor", "hidden_factor"):
            self._store(name, _positive_integer(name, getattr(self, name)))
            if name != "train_length" and getattr(self, name) > LARGEST_SIZE:
                raise ValueError(f"{name}: expected at most {LARGEST_SIZE}, got {getattr(self, name)}")
        if self.train_length * self.max_factor > 2**53:
            tokens = f"{self.train_length} * {self.max_factor}"
            raise ValueError(f"train_length: expected at most 2^53 for train_length * max_factor, got {tokens}")
        rotary_dim = self.head_dim if self.rotary_dim is None else _positive_integer("rotary_dim", self.rotary_dim)
        # one pair has i = R - 1 = 0: the NTK exponent i / (R - 1) does not exist.
        if rotary_dim % 2 or not 4 <= rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim: expected an even number from 4 to head_dim = {self.head_dim}, got {rotary_dim}"
            )
        self._store("rotary_dim", rotary_dim)
        for name in ("rope_base", "ntk_base"):
            self._store(name, _real_above(name, getattr(self, name), 1.0))
        self._store("step_size", _real_above("step_size", self.step_size, 0.0))
        one_of("activation", self.activation, ("tanh", "silu"))
        one_of("scale_policy", self.scale_policy, ("integer", "continuous"))
        one_of("log_scale", self.log_scale, (False, True, "clamped"))
        if self.log_scale and self.train_length == 1:
            raise ValueError("log_scale: expected train_length > 1, since it divides by ln(train_length), got 1")

    @property
    def pairs(self) -> int:
        """R, the number of rotary pairs."""
        return self.rotary_dim // 2

    @property
    def hidden_size(self) -> int:
        """M, the width of the ODE's hidden layer."""
        return self.hidden_factor * self.rotary_dim

    def length_factor(self, length: int) -> float:
        """The length factor t of a sequence of `length` tokens, in [1, max_factor] by `scale_policy`."""
        length = _integer("length", length)
        if length < 0:
            raise ValueError(f"length: expected a number of tokens >= 0, got {length}")
        # before it becomes a float, for which an int may be too large.
        length = min(length, self.train_length * self.max_factor)
        if self.scale_policy == "integer":
            factor = float(-(-length // self.train_length))
        else:
            factor = length / self.train_length
        return max(factor, 1.0)

    @classmethod
    def from_transformers(cls, config: Any) -> "ClexConfig":
        """The settings in a transformers configuration (an object or its dictionary) whose RoPE is of type "clex".

        Read are `rope_parameters` or `rope_scaling` as the authors write it ({"type": "clex", "max_factor": 16,
        "param_factor": 1, "act": "silu", "time_dt": 0.01}), with `rope_theta`, `partial_rotary_factor`,
        `original_max_position_embeddings`, `log_scale`, `ntk_base` and `scale_policy` there or in the configuration
        itself; `head_dim` or `hidden_size // num_attention_heads`; `max_position_embeddings` as train_length.
        A missing "act" means SiLU, which the authors' first checkpoints had before the key existed.

        Raises:
            ValueError: the RoPE is not of type "clex", or a needed field is missing or out of range.
            TypeError: a field has the wrong type.
        """
        # a multimodal model keeps its language model's settings one level down.
        config = _read(config, "text_config", default=config)
        rope = _clex_parameters(config)
        head_dim = _read(config, "head_dim")
        if head_dim is None:
            heads = _positive_integer("num_attention_heads", _needed(config, "num_attention_heads"))
            head_dim = _positive_integer("hidden_size", _needed(config, "hidden_size")) // heads
        head_dim = _positive_integer("head_dim", head_dim)
        part = _either(rope, config, "partial_rotary_factor", default=_read(config, "rotary_pct", default=1.0))
        train_length = _either(rope, config, "original_max_position_embeddings")
        return cls(
            head_dim=head_dim,
            train_length=_needed(config, "max_position_embeddings") if train_length is None else train_length,
            max_factor=_whole(_needed(rope, "max_factor")),
            # an infinite product has no int.
            rotary_dim=int(min(head_dim * _real_above("partial_rotary_factor", part, 0.0), 2.0**62)),
            rope_base=_either(rope, config, "rope_theta", default=cls.rope_base),
            ntk_base=_either(rope, config, "ntk_base", default=cls.ntk_base),
            hidden_factor=_whole(_read(rope, "param_factor", default=cls.hidden_factor)),
            activation=_read(rope, "act", default="silu"),
            step_size=_read(rope, "time_dt", default=cls.step_size),
            scale_policy=_either(rope, config, "scale_policy", default=cls.scale_policy),
            log_scale=_either(rope, config, "log_scale", default=cls.log_scale),
        )

    def to_transformers(self) -> dict[str, Any]:
        """The settings as rope_parameters of a transformers configuration, which from_transformers reads back.

        But for head_dim, and with `original_max_position_embeddings` as train_length.
        """
        part = self.rotary_dim / self.head_dim
        if int(self.head_dim * part) < self.rotary_dim:
            part = math.nextafter(part, math.inf)
        return {
            "rope_type": "clex",
            "rope_theta": self.rope_base,
            "max_factor": self.max_factor,
            "param_factor": self.hidden_factor,
            "act": self.activation,
            "time_dt": self.step_size,
            "original_max_position_embeddings": self.train_length,
            "partial_rotary_factor": part,
            "ntk_base": self.ntk_base,
            "scale_policy": self.scale_policy,
            "log_scale": self.log_scale,
        }

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _clex_parameters(config: Any) -> Mapping[str, Any]:
    found = []
    for field in _ROPE_FIELDS:
        rope = _read(config, field)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise TypeError(f"{field}: expected a dictionary, got {type(rope).__name__}")
        kinds = [rope[key] for key in _KIND_KEYS if key in rope]
        if any(isinstance(kind, str) and kind == "clex" for kind in kinds):
            return rope
        found.append(f"{field} = {dict(rope)}")
    raise ValueError(f'config: expected rope_parameters or rope_scaling of type "clex", got {found or "neither"}')


def _read(config: Any, name: str, default: Any = None) -> Any:
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _needed(config: Any, name: str) -> Any:
    value = _read(config, name)
    if value is None:
        raise ValueError(f"{name}: expected in the configuration, got nothing")
    return value


def _either(rope: Mapping[str, Any], config: Any, name: str, default: Any = None) -> Any:
    return _read(rope, name, default=_read(config, name, default=default))


def _whole(value: Any) -> Any:
    # JSON written by other tools turns 16 into 16.0.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return int(value)


def _positive_integer(name: str, value: Any) -> int:
    if not 1 <= _integer(name, value) < 2**63:
        raise ValueError(f"{name}: expected a positive integer below 2^63, got {value}")
    return int(value)


def _real_above(name: str, value: Any, bound: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not bound < number < math.inf:
        raise ValueError(f"{name}: expected a finite number > {bound:g}, got {number}")
    return number


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError unless `value` is among the choices."""
    # 1 == True: the type decides as well.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_config(config: Any) -> None:
    """Raises TypeError unless `config` is a ClexConfig."""
    if not isinstance(config, ClexConfig):
        raise TypeError(f"config: expected a ClexConfig, got {type(config).__name__}")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_integer(name: str, value: Any, least: int = 0, most: int = 2**53) -> int:
    """`value` as an int; raises TypeError or ValueError unless it is one from `least` to `most`."""
    if _integer(name, value) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {value}")
    return int(value)
