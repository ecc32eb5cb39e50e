"""A screen put together from its settings and from what lies on disk."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spider_sense.errors import ConfigError
from spider_sense.models import LoadedModel
from spider_sense.screening.bank_making import open_bank
from spider_sense.screening.cascade import Cascade
from spider_sense.screening.envelope import Sealer
from spider_sense.screening.judge_model import JudgeModel
from spider_sense.screening.keys import OperatorKey
from spider_sense.screening.leaks import LeakWatch
from spider_sense.screening.protocols import SpanReader
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.screen import Screen
from spider_sense.screening.secret_file import protect_all
from spider_sense.screening.sense import ModelSense
from spider_sense.screening.settings import ScreenSettings
from spider_sense.screening.stage_guard import StageGuard
from spider_sense.screening.tool_rules import ToolRules

__all__ = ["open_screen"]


@contextmanager
def open_screen(
    settings: ScreenSettings,
    loaded: LoadedModel,
    stages: Path | None = None,
    bank: Path | None = None,
    reader: SpanReader | None = None,
) -> Iterator[Screen]:
    """Give a screen; its judge's connections are closed at the end of the block.

    Args:
        settings: what it does.
        loaded: the served model.
        stages: folder of the stages' probes; without it every span is a suspect.
        bank: folder of signatures.
        reader: finds the stages; by default in what the model's own chat template renders.

    Raises:
        ConfigError: if the settings do not fit one another.
        MismatchError: if probes or signatures are for another model.
        MissingExtraError: if a setting needs a package that is not installed.
    """
    key = OperatorKey.from_env(settings.key_env) if settings.key_env else None
    held = open_bank(bank, loaded) if bank else None
    guard = StageGuard.from_pretrained(stages) if stages else None
    rules = ToolRules(settings.tools) if settings.tools else None
    with ExitStack() as stack:
        judge = stack.enter_context(JudgeModel(settings.judge)) if settings.judge else None
        yield Screen(
            reader or ChatSpans(loaded.tokenizer),
            ModelSense(loaded, guard, held.site if held else None),
            Cascade(settings.stages, held, judge, rules),
            leaks=_leaks(settings, key),
            sealer=Sealer(key, settings.envelope_seconds) if key else None,
            relayed=settings.relayed,
        )


def _leaks(settings: ScreenSettings, key: OperatorKey | None) -> LeakWatch | None:
    if settings.secrets is None:
        return None
    if key is None:
        raise ConfigError("secrets are kept as keyed digests, and there is no key; name its variable with key_env")
    watch = LeakWatch(key)
    protect_all(watch, settings.secrets)
    return watch
