"""Envelopes: what the sender's side vouches for when an agent's message goes to another agent.

An envelope names the sender, the receiver and what screening said of the message where it left, and is bound to the
message's text by a keyed digest. Agents do not hold the key, so no message can write its own envelope. The same text
sent to the same receiver once more is not told apart from the first until the envelope is too old.
"""

import hmac
import json
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, ValidationError

from spider_sense.errors import SignatureError
from spider_sense.folders import Record
from spider_sense.screening.keys import OperatorKey
from spider_sense.screening.stage import Stage
from spider_sense.screening.verdict import Outcome, StageVerdict
from spider_sense.types import Zone

__all__ = ["LIFETIME", "Envelope", "Sealer"]

LIFETIME = 3600.0
"""Seconds."""


class Envelope(Record):
    """What is vouched for."""

    sender: str = Field(min_length=1)
    """Principal."""
    receiver: str = Field(min_length=1)
    """Principal."""
    stage: Stage
    """Of the message in the sender's conversation."""
    zone: Zone
    """What was sensed there."""
    outcome: Outcome
    """What was decided there."""
    issued: str
    """ISO 8601."""
    mac: str = ""
    """HMAC-SHA256 in hexadecimal over all other fields and the text."""


class Sealer:
    """Makes and checks envelopes.

    Args:
        key: the operator's.
        lifetime: seconds for which an envelope is believed; infinity for recorded conversations.
    """

    def __init__(self, key: OperatorKey, lifetime: float = LIFETIME) -> None:
        self._key, self._lifetime = key.derived("envelope"), lifetime

    def seal(self, text: str, sender: str, receiver: str, verdict: StageVerdict) -> dict[str, Any]:
        """Return an envelope as a message carries it, under the key ``envelope``.

        Args:
            text: the message's content, exactly.
            sender: principal whose agent wrote it.
            receiver: principal whose agent will read it.
            verdict: what screening said of it there.
        """
        envelope = Envelope(
            sender=sender,
            receiver=receiver,
            stage=verdict.stage,
            zone=verdict.zone,
            outcome=verdict.outcome,
            issued=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return envelope.model_copy(update={"mac": self._mac(envelope, text)}).model_dump(mode="json")

    def open(self, record: object, text: str, receiver: str | None) -> Envelope:
        """Check an envelope.

        Args:
            record: as the message carries it.
            text: the message's content.
            receiver: principal whose agent reads it.

        Raises:
            SignatureError: if it has not the form of one, is for another receiver, is too old, or was not made with the
                key for this text.
        """
        try:
            envelope = Envelope.model_validate(record)
        except ValidationError as error:
            fields = sorted({str(fault["loc"][0]) for fault in error.errors() if fault["loc"]} & _FIELDS)
            raise SignatureError(f"its envelope has not the form of one: {', '.join(fields) or 'keys'}") from error
        # compare_digest takes no text beyond ASCII.
        if not hmac.compare_digest(envelope.mac.encode("utf-8", "replace"), self._mac(envelope, text).encode()):
            raise SignatureError("its envelope was not made for this text with the operator's key")
        if envelope.receiver != receiver:
            raise SignatureError(f"its envelope is for {envelope.receiver}, not for {receiver or 'nobody'}")
        age = (datetime.now(UTC) - datetime.fromisoformat(envelope.issued)).total_seconds()
        if age > self._lifetime:
            raise SignatureError(f"its envelope is {age:.0f} seconds old, more than {self._lifetime:.0f}; send it anew")
        return envelope

    def _mac(self, envelope: Envelope, text: str) -> str:
        content = [envelope.model_dump(mode="json", exclude={"mac"}), text]
        return hmac.digest(self._key, json.dumps(content, sort_keys=True).encode(), "sha256").hex()


_FIELDS = set(Envelope.model_fields)
