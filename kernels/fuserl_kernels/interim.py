"""Plain PyTorch stand-ins for the decoder's ops while their kernels are written."""

import torch
import torch.nn.functional as F

from fuserl_kernels.norms import rms_norm


def glu(gate_up, *, activation="silu"):  # type: ignore
    gate, up = gate_up.chunk(2, dim=-1)
    act = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}.get(activation)
    return (act(gate) if act else F.gelu(gate, approximate="tanh")) * up


def _rotate(x, cos, sin, interleaved):  # type: ignore
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
    else:
        a, b = turning[..., :half], turning[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    one, two = a * cos - b * sin, b * cos + a * sin
    out = torch.stack((one, two), -1).flatten(-2) if interleaved else torch.cat((one, two), -1)
    return torch.cat((out.to(x.dtype), rest), -1)


def rotary(
    qkv,
    cos,
    sin,
    positions,
    *,
    num_heads,
    num_kv_heads,
    interleaved=False,
    q_norm_weight=None,
    k_norm_weight=None,
    eps=1e-6,
    weight_offset=0.0,
):  # type: ignore  # noqa: E501
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, eps=eps, weight_offset=weight_offset)
    if k_norm_weight is not None:
        k = rms_norm(k, k_norm_weight, eps=eps, weight_offset=weight_offset)
    cos, sin = cos[positions], sin[positions]
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved), v.clone()


def rotary_kv_write(qkv, cos, sin, positions, key_cache, value_cache, slots, offsets, **heads):  # type: ignore  # noqa: E501
    q, k, v = rotary(qkv, cos, sin, positions, **heads)
    on = slots >= 0
    key_cache[slots[on], :, offsets[on]] = k[on]
    value_cache[slots[on], :, offsets[on]] = v[on]
    return q


def decode_attention(
    query,
    key_cache,
    value_cache,
    lengths,
    *,
    slots=None,
    prefix_keys=None,
    prefix_values=None,
    prefix_ids=None,
    prefix_lengths=None,
    scale=None,
    window=None,
    softcap=None,
):  # type: ignore  # noqa: E501
    outs = []
    for b in range(len(query)):
        slot = b if slots is None else int(slots[b])
        n = int(lengths[b])
        k, v = key_cache[slot, :, :n], value_cache[slot, :, :n]
        if prefix_ids is not None and int(prefix_ids[b]) >= 0:
            p = int(prefix_ids[b])
            m = int(prefix_lengths[p])
            k = torch.cat((prefix_keys[p, :, :m], k), 1)
            v = torch.cat((prefix_values[p, :, :m], v), 1)
        if window is not None:
            k, v = k[:, -window:], v[:, -window:]
        g = query.shape[1] // k.shape[0]
        q = query[b].view(k.shape[0], g, -1)
        s = (q.float() @ k.float().transpose(1, 2)) * (scale or query.shape[-1] ** -0.5)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        outs.append((s.softmax(-1) @ v.float()).view(query.shape[1], -1).to(query.dtype))
    return torch.stack(outs)

__all__ = ["decode_attention", "glu", "rotary", "rotary_kv_write"]
