"""sample_tokens in the compiled modules: float32, bf16 or fp16 rows, on the CPU and in CUDA C++."""

from typing import Any

import torch

from fuserl_kernels import native
from fuserl_kernels.token_logprobs import _unit_stride


def sample_native(
    logits: torch.Tensor,  # [B, V]
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    request_ids: torch.Tensor,  # [B] int64
    positions: torch.Tensor,  # [B] int64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns token_ids int64, logprobs and truncated_logprobs float32 [B]."""
    options = (temperature, top_k, top_p, min_p, seed)
    where = {"num_threads": torch.get_num_threads()}
    return _sample(logits, *options, request_ids, positions, where)


def sample_cuda(
    logits: torch.Tensor,  # [B, V]
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    request_ids: torch.Tensor,  # [B] int64
    positions: torch.Tensor,  # [B] int64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in one launch on the current stream.

    Raises ValueError for more than 2^22 columns, which would overflow the fixed point."""
    options = (temperature, top_k, top_p, min_p, seed)
    stream = torch.cuda.current_stream(logits.device)
    where = {"device": stream.device_index, "stream": stream.cuda_stream}
    return _sample(logits, *options, request_ids, positions, where)


def _sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    request_ids: torch.Tensor,
    positions: torch.Tensor,
    where: dict[str, Any],  # what the module for the device of the logits wants to know besides
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    logits = _unit_stride(logits)
    request_ids, positions = request_ids.contiguous(), positions.contiguous()
    token_ids = logits.new_empty(num_rows, dtype=torch.int64)
    logprobs = logits.new_empty(num_rows, dtype=torch.float32)
    truncated_logprobs = logits.new_empty(num_rows, dtype=torch.float32)
    native.module(logits.device.type).sample_tokens(
        logits=logits.data_ptr(),
        dtype=native.dtype(logits),
        num_rows=num_rows,
        vocab_size=vocab_size,
        row_stride=logits.stride(0),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        request_ids=request_ids.data_ptr(),
        positions=positions.data_ptr(),
        token_ids=token_ids.data_ptr(),
        logprobs=logprobs.data_ptr(),
        truncated_logprobs=truncated_logprobs.data_ptr(),
        **where,
    )
    return token_ids, logprobs, truncated_logprobs
