"""The command line: verbs by what they are for; ``show`` holds what they print.

Imports stand inside the commands: ``visistage --help`` must load neither ONNX Runtime nor torch.
"""
