"""A fake CUDA device: real runs of the real code on a machine without a GPU, with tensors of `cuda:0`.

A small C++ library (`device.cpp`, `operators.cpp`) registers `DeviceType::CUDA` on host memory; `torch_cuda.py` gives
`torch.cuda` its Python side, `process_group.py` a group of one rank that calls itself NCCL. `python -m
pretend_gpu.start` then runs any verb: the trainer, DeepSpeed with its own CUDA accelerator, and the Triton kernels in
the interpreter take every branch that they take on one GPU.

It shows: tensors on the wrong device, reads of memory before its first write, what DeepSpeed does on CUDA at world
size 1 (buffers, buckets, optimizer state, checkpoints), what it would compile or start, and, as the operators compute
on the CPU, that the CUDA branches give the CPU's numbers.

It cannot show: races (every operator is done when its call returns, a forgotten wait changes nothing), CUDA's own
kernels, rounding, speed and memory, NCCL, more than one rank, or an operator that a CUDA build lacks.
"""
