"""The parity ladder: is what a bundle's files compute what the checkpoint computes, rung by rung?

A rung is compared with the one below it, on the bundle's own files. Each is run, or it is said why
this machine cannot; ``visistage verify`` writes the result beside the files.
"""
