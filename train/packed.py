"""Training on rows of all lengths without padding: a batch is one long row, its rows laid end to end.

TRL's padding-free collator makes that row, its `position_ids` begin at 0 with each of its rows. Three things are done
here otherwise than in TRL and transformers, exactly and only to be fast:

- attention by the name "rows": each row by itself. transformers' own `sdpa` builds a mask of all tokens by all tokens;
- logits of those positions alone whose next token is learnt, and no entropy or accuracy, which nobody reads;
- on a CPU dropout with 16 random bits an element, an eighth of the time that PyTorch's serial generator takes.

Imports torch and TRL: to be imported where training begins, no sooner.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from trl import SFTTrainer

from factory.errors import UserError
from train.live import Pace
from train.rows import IGNORED

Tensor = torch.Tensor


class PackedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer for padding-free batches, with the pace that it keeps in its logs."""

    def __init__(self, *, pace: Pace, **settings: Any) -> None:
        super().__init__(**settings)
        self.pace = pace

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean cross entropy of the learnt tokens of the whole step: nats, over `num_items_in_batch` of them."""
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        labels = inputs["labels"][0]
        self.pace.tokens += labels.numel()
        before = (labels[1:] != IGNORED).nonzero().flatten()
        logits = model(**rest, use_cache=False, logits_to_keep=before).logits[0]
        total = F.cross_entropy(logits.float(), labels[before + 1], reduction="sum") / num_items_in_batch
        shared: Tensor = total * self.accelerator.num_processes  # counted over all, whose gradients are averaged
        return shared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | self.pace.figures(), start_time)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int = 0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each row of a packed batch; without packing, what `sdpa` does.

    `query` is [1, heads, tokens, size], `cu_seq_lens_q` int32 [rows + 1] where rows begin and end, as the collator
    gives it. Returns [1, tokens, heads, size].

    Raises:
        UserError: the model wants what is not done here.
    """
    window = others.get("sliding_window") or max_length_q
    if others.get("softcap") or others.get("dropout") or others.get("s_aux") is not None or window < max_length_q:
        raise UserError(
            "attention: rows knows no cap, sinks, dropout or window shorter than a row, and this base has one of them\n"
            "  then set train.attention: sdpa in the profile"
        )
    if cu_seq_lens_q is None:
        causal = attention_mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    if query.is_cuda and query.dtype != torch.float32:  # PyTorch's own FlashAttention knows rows
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        ends, longest = cu_seq_lens_q, max_length_q
        found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(found, Tensor)  # no log-sum-exp was asked for
        return found[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    outs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*(torch.split(t, sizes, 2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask for packed rows; that of `sdpa` for padded ones, and for what goes on behind a cache."""
    if attention_mask is None and q_length in (1, kv_length):
        return None
    mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)
    return mask


AttentionInterface.register("rows", attend)
AttentionMaskInterface.register("rows", _mask)


class Dropout(torch.nn.Module):
    """torch.nn.Dropout at `p` rounded to a 65,536th; on a CPU much faster, from other random numbers."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.is_cuda:
            return F.dropout(x, self.p, self.training)
        dropped = round(self.p * 65536)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # 64 random bits each
        kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
        return x * kept.to(x.dtype).mul_(65536 / (65536 - dropped))


def use_fast_dropout(model: Any) -> None:
    """Puts `Dropout` in the place of torch's in every LoRA layer of `model` (PEFT)."""
    from peft.tuners.lora import LoraLayer

    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name, own in layer.lora_dropout.items():
            if isinstance(own, torch.nn.Dropout):
                layer.lora_dropout[name] = Dropout(own.p)
