"""What others do to bring a model from one process into another, each in one small file with one form.

Every module has `open_sender(state, options)` and `open_receiver(specs, address, options)`: see `peer_process.py`.
They are written as their users write them, in the best configuration that is known here; several pickle, because that
is what is compared. None checks what it moves, unless it says so.
"""
