"""Engines outside: what weightcast asks of an engine, and the engines that it speaks to.

`weightcast.adapters.engine` is the protocol, `weightcast.adapters.follower` the loop that keeps an engine in step
with a publisher. Each engine has a folder of its own and imports its package only there.
"""
