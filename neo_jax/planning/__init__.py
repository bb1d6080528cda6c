"""What a training step would need and take on a TPU, asked of the TPU's own compiler.

`topologies` names the machines, `hlo` reads compiled programs, `predict` times them,
`compiling` compiles the real step, `search` looks for settings. `plan.py` is the command.
"""
