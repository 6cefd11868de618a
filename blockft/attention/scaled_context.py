"""Attention whose weights over the context are sharpened and scaled (APE, arXiv 2502.05431, section 4).

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H / K, D head size.
"""

from dataclasses import dataclass

import torch

from blockft.attention.backends import AttentionMasks


@dataclass(frozen=True, kw_only=True)
class ScaledContextAttention:
    """Attention with a temperature and a scale over the context. The attention function calls it per layer.

    A query's score of a context token is divided by `temperature`. The logarithm of the sum of the
    exponentials of these scores, which weighs the context against all other tokens, is multiplied by `scale`.
    With a temperature and a scale of 1 this is plain attention under the mask.

    masks          which tokens a query attends to
    is_context_BS  the key tokens that belong to the context
    """

    masks: AttentionMasks
    is_context_BS: torch.Tensor
    temperature: float
    scale: float

    def attend(
        self,
        layer: int,
        q_BHTD: torch.Tensor,
        keys_BKSD: torch.Tensor,
        values_BKSD: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Return the attention output, computed in float32: (B, T, H, D)."""
        num_heads, num_kv_heads = q_BHTD.shape[1], keys_BKSD.shape[1]
        batch, num_queries, head_size = len(q_BHTD), q_BHTD.shape[2], q_BHTD.shape[3]
        grouped = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries, head_size)
        q_BKGTD = q_BHTD.reshape(grouped).float()
        scores_BKGTS = q_BKGTD @ keys_BKSD[:, :, None].float().mT * scaling
        allowed = self.masks.dense(window, num_queries)[:, :, None]
        scores_BKGTS = scores_BKGTS.masked_fill(~allowed, -torch.inf)
        is_context = self.is_context_BS[:, None, None, None]
        context_BKGTS = (scores_BKGTS / self.temperature).masked_fill(~is_context, -torch.inf)
        log_sum = context_BKGTS.logsumexp(dim=-1, keepdim=True)
        # a query that attends to no context has nothing to scale
        shift = torch.where(log_sum.isfinite(), (self.scale - 1) * log_sum, 0)
        weights_BKGTS = torch.where(is_context, context_BKGTS + shift, scores_BKGTS).softmax(dim=-1)
        out_BKGTD = weights_BKGTS @ values_BKSD[:, :, None].float()
        return out_BKGTD.flatten(1, 2).transpose(1, 2).contiguous().to(q_BHTD.dtype)
