"""The base model: found, refused where an adapter cannot work on it, and loaded."""

from typing import Any

from factory.errors import UserError, relative
from factory.paths import Home, Profile

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def refuse_mixture(config: dict[str, Any], where: str) -> None:
    """Refuses a mixture-of-experts base; `config` is its config.json, `where` the place that names it.

    Raises:
        UserError: the base routes tokens among experts of its own.
    """
    inner = config.get("text_config")  # multimodal configs keep the language model's keys one level down
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in EXPERT_COUNTS:
            count = part.get(key)
            if isinstance(count, int) and count > 1:
                raise UserError(
                    f"{where}: a mixture-of-experts base ({key}: {count}) is refused: its own routing sends each\n"
                    f"  token through a few of its experts, which dilutes the adapter; name a dense base instead"
                )


def read_config(home: Home, profile: Profile) -> dict[str, Any]:
    """The base's configuration as a mapping.

    Raises:
        UserError: a mixture of experts, or neither in its folder nor to be had from the hub.
    """
    from transformers import AutoConfig

    config: dict[str, Any] = _load(AutoConfig, home, profile).to_dict()
    refuse_mixture(config, f"{relative(home.profile(profile.name))}: base.model: {profile.model}")
    return config


def load_tokenizer(home: Home, profile: Profile) -> Any:
    """The base's tokenizer (transformers).

    Raises:
        UserError: it is neither in its folder nor to be had from the hub.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, home, profile)


def load_base(home: Home, profile: Profile) -> Any:
    """The base's weights (transformers), in the profile's dtype.

    Raises:
        UserError: a mixture of experts, or neither in its folder nor to be had from the hub.
    """
    import torch
    from transformers import AutoModelForCausalLM

    read_config(home, profile)
    return _load(AutoModelForCausalLM, home, profile, dtype=getattr(torch, profile.train.dtype))


def _load(kind: Any, home: Home, profile: Profile, **options: Any) -> Any:
    folder = profile.model_path(home)
    source, revision = (str(folder), None) if folder else (profile.model, profile.revision)
    try:
        return kind.from_pretrained(source, revision=revision, **options)
    except (OSError, ValueError) as error:
        where, why = relative(home.profile(profile.name)), str(error).splitlines()[0]
        raise UserError(
            f"{where}: base.model: {profile.model!r} cannot be loaded ({why})\n  then {profile.to_fetch(home)}"
        ) from None
