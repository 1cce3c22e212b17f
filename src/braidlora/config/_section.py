"""What all sections of a recipe have in common: the base class, and types with their ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from braidlora.config._names import name_problem


def _checked_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(problem)
    return name


TaskName = Annotated[str, AfterValidator(_checked_name)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
# Every integer has an upper bound: far above useful values, and below what crashes a native library.
MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST)]  # 0 has a special meaning
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Experts = Annotated[int, Field(ge=1, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # or processes
Rows = Annotated[int, Field(ge=1, le=65_536)]  # in a batch
Tokens = Annotated[int, Field(ge=1, le=2**24)]
Beams = Annotated[int, Field(ge=1, le=1024)]


def one_of(names: Callable[[], Iterable[str]]) -> AfterValidator:
    """A validator for names that a table declares, with the message of a `Literal`."""

    def check(name: str) -> str:
        known = list(names())
        if name not in known:
            listed = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise PydanticCustomError("unknown_name", "Input should be {listed}", {"listed": listed})
        return name

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        """In Python True == 1, so `r: true` would give an adapter of rank 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if kinds & {int, float} and not kinds & {bool, Any} and _holds_boolean(value):
            raise ValueError(f"got {value!r}; expected a number, not true or false")
        return value

    def is_given(self, key: str) -> bool:
        """Whether `key` has a value other than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation such as `dict[str, int | None]`."""
    inner = get_args(annotation)
    return {annotation}.union(*map(_kinds, inner)) if inner else {annotation}


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_boolean, value.values()))
    return isinstance(value, bool) or (isinstance(value, list) and any(map(_holds_boolean, value)))
