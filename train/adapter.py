"""The trained adapter on its base, as PEFT applies it: what parity and audit measure."""

import warnings
from typing import Any

from factory.errors import UserError, relative
from factory.paths import Home
from factory.store import need


def needed(home: Home, expert: str) -> None:
    """Whether there is an adapter, asked before minutes are spent.

    Raises:
        UserError: there is none, and what makes it.
    """
    need(home.expert(expert, "adapter") / "adapter_config.json", f"dmoe train {expert}")


def load_adapter(home: Home, expert: str, base: Any) -> Any:
    """`base` (transformers) with the expert's adapter switched on: a PEFT model, not in training.

    Raises:
        UserError: there is no adapter, or it is damaged or of another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    needed(home, expert)
    folder = home.expert(expert, "adapter")
    try:
        with warnings.catch_warnings():  # PEFT 0.21 asks transformers for a property that it has renamed
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(base, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{relative(folder)}: cannot be loaded ({why})\n  then run: dmoe train {expert}") from None
