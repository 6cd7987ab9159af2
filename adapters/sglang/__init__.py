"""SGLang: a client of its weight-update routes, and the sender for its process group.

| file | runs in |
|---|---|
| `client` | any process that reaches the server |
| `updater` | the process that has the weights: rank 0 of a group in which all workers of all engines are |
| `engine` | one server as an `Engine`, for `EngineFollower`: it stages from a publisher, checks, and broadcasts |
| `conformance_server`, `conformance_worker` | a stand-in that answers these routes and receives as it does, on CPUs |

Read in SGLang 0.5.23. SGLang itself needs a GPU and has not been run against this.
"""
