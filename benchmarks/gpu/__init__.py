"""Does everything work on a GPU, and what does pruning bring there?

    python -m benchmarks.gpu              # all checks; writes outputs/gpu/gpu.json after each, and prints the page
    python -m benchmarks.gpu --small      # the same checks on tiny networks, on the CPU too, in a minute
    python -m benchmarks.gpu --report     # writes docs/results/gpu.md from docs/results/data/gpu.json

Correctness comes first, then latency and memory, and last what inductor compiles. An error in one check is recorded
and does not stop the others; ``--resume`` goes on where a process died.

The checks need this repository and torch, torchvision, lightning, torchmetrics, numpy, scipy, pillow, safetensors,
matplotlib, tensorboard, rich, tqdm, joblib, cloudpickle, timm and huggingface-hub, with triton and a C compiler for
``torch.compile``. They read no files and need no network. On a machine that has these, one wheel must be carried:

    pip download --no-deps segmentation-models-pytorch==0.6.0

``lightning-prune`` and its configuration files need ``hydra-core``, ``omegaconf`` and ``antlr4-python3-runtime`` too,
but the checks do not. With ``onnx``, ``onnxscript`` and ``onnxruntime``, exports and latency tables of ONNX Runtime
are checked too.
"""
