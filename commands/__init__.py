"""The commands, by what they are for; each is one call, and ``console`` shows what it returns.

Imports stand inside the commands: ``visistage --help`` must not load ONNX Runtime or torch.
"""
