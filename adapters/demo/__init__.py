"""`weightcast demo`: the main job end to end, with a live table, a report and a proof.

It starts the trainer and the engine as processes of their own and talks to them over HTTP and event files; start
reading in `job.py`.
"""
