"""Jobs and replies of clients as messages. A reply may come from anyone, so its header is validated strictly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from braidlora.errors import FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.protocol.failure import CODES, Failure
from braidlora.federated.protocol.wire import Message
from braidlora.federated.simulation.runner import Job, Reply
from braidlora.federated.site.scores import Scores

JOB = "job"
_MOST_EXTRA = 16
_FLAGS = ("train", "score", "score_before", "save_predictions", "save_adapter")
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e12, le=1e12)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _Failure(_Part):
    kind: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,79}$")]
    code: str

    @field_validator("code")
    @classmethod
    def _known(cls, code: str) -> str:
        if code not in CODES:
            raise ValueError(f"expected one of {', '.join(CODES)}")
        return code


class _Score(_Part):
    """A task's score, with whatever numbers, labels or short texts the metric adds."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    metric: Name
    score: Number
    n: Count

    @model_validator(mode="after")
    def _small(self) -> _Score:
        extra = self.__pydantic_extra__ or {}
        if len(extra) > _MOST_EXTRA or not all(
            _is_small(key) and _is_small(one) for key, one in extra.items()
        ):
            raise ValueError("expected a few numbers, short texts or lists of them")
        return self


def _is_small(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(isinstance(one, str) and _is_small(one) for one in value)
    if isinstance(value, str):
        return len(value) <= 256 and value.isprintable()
    return value is None or (isinstance(value, int | float) and abs(value) <= 1e12)


class _Scores(_Part):
    own: dict[Name, _Score]
    common: dict[Name, _Score]


class _Reply(_Part):
    failure: _Failure | None = None
    update: Annotated[str, StringConstraints(max_length=1 << 16)] | None = None
    loss: Number | None = 0.0
    losses: dict[Name, Number] = {}
    steps: Count = 0
    seconds: Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e9)] = 0.0
    before: _Scores | None = None
    scores: _Scores | None = None


def pack_job(job: Job) -> Envelope:
    """A job as a message. The client's folder is the site's own business."""
    flags = {flag: getattr(job, flag) for flag in _FLAGS}
    return Envelope(JOB, {"payload": job.payload.header.decode(), **flags}, job.payload.tensors)


def unpack_job(envelope: Envelope, client: str, site: Path) -> Job:
    """The job of a message, for this client in its folder.

    Raises:
        FederationError: it is not a job.
    """
    header = envelope.header
    flags = {flag: header.get(flag) is True for flag in _FLAGS}
    if not isinstance(header.get("payload"), str):
        raise FederationError("received a message that is not a job.")
    return Job(client, site, Message(header["payload"].encode(), envelope.tensors), **flags)


def pack_reply(reply: Reply) -> Envelope:
    """A reply as a message."""
    header: dict[str, Any] = {
        "failure": dataclasses.asdict(reply.failure) if reply.failure is not None else None,
        "update": reply.update.header.decode() if reply.update is not None else None,
        "loss": float(reply.loss) if reply.loss is not None else None,
        "losses": {name: float(loss) for name, loss in reply.losses.items()},
        "steps": reply.steps,
        "seconds": float(reply.seconds),
        "before": reply.before.to_json() if reply.before is not None else None,
        "scores": reply.scores.to_json() if reply.scores is not None else None,
    }
    return Envelope(JOB, header, reply.update.tensors if reply.update is not None else b"")


def unpack_reply(envelope: Envelope, job: Job, tasks: set[str]) -> Reply:
    """The reply of a message to this job. Its update has yet to be judged.

    Args:
        tasks: names of the recipe's tasks, of which a reply has losses and scores.

    Raises:
        FederationError: it is not a reply to this job; with what is wrong.
    """
    try:
        found = _Reply.model_validate(envelope.header)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "header"
        raise FederationError(f"the reply is not valid: {where}: {first['msg']}") from None
    named = {*found.losses}
    for scores in (found.before, found.scores):
        named |= {*scores.own, *scores.common} if scores is not None else set()
    if unknown := sorted(named - tasks):
        raise FederationError(
            f"the reply is not valid: it has scores or losses of {unknown[0][:80]!r}, no task."
        )
    if found.failure is not None:
        return Reply(job.client, failure=Failure(found.failure.kind, found.failure.code))
    if job.train and found.update is None:
        raise FederationError("the reply is not valid: it has no update.")
    if job.score and found.scores is None and found.loss is not None:  # None: it keeps them to itself
        raise FederationError("the reply is not valid: it has no scores.")
    update = Message(found.update.encode(), envelope.tensors) if job.train and found.update else None
    return Reply(
        job.client,
        update=update,
        loss=found.loss,
        losses=dict(found.losses),
        steps=found.steps,
        seconds=found.seconds,
        before=_scores(found.before),
        scores=_scores(found.scores),
    )


def _scores(found: _Scores | None) -> Scores | None:
    if found is None:
        return None
    own, common = (
        {name: one.model_dump(exclude_unset=True) for name, one in part.items()}
        for part in (found.own, found.common)
    )
    return Scores(own, common)
