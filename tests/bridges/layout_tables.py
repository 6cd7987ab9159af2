"""Layouts: how models are cut, by the number of processes; names are as the support page has them.

`LAYOUTS[4]` run in four gloo processes and `LAYOUTS[8]` in eight; what a layout leaves over is data parallelism. All
of them divide models of four layers, four heads and four experts.
"""

from collections.abc import Mapping
from typing import Any

Sizes = Mapping[str, Any]

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
STAGES = "pipeline_model_parallel_layout"
SP: dict[str, Any] = {"sequence_parallel": True}

# Without Transformer Engine Megatron trains experts under tensor parallelism with sequence parallelism only.
DENSE: Mapping[int, Mapping[str, Sizes]] = {
    4: {
        "tp1": {},
        "tp2": {TP: 2},
        "tp2-sp": {TP: 2} | SP,
        "tp4": {TP: 4},
        "pp2": {PP: 2},
        "pp2-vpp2": {PP: 2, VPP: 2},
        "tp2-pp2": {TP: 2, PP: 2},
        "pp2-first1": {PP: 2, FIRST: 1},
        "pp4-first1-last1": {PP: 4, FIRST: 1, LAST: 1},
        "pp4-E|tt|tt|L": {PP: 4, STAGES: "E|tt|tt|L"},
        "pp2-vpp3-E-and-L-counted": {PP: 2, VPP: 3, EMBEDDING: True, LOSS: True},
        "cp2": {CP: 2},
        "cp2-tp2-sp": {CP: 2, TP: 2} | SP,
    },
    8: {
        "tp4-pp2": {TP: 4, PP: 2},
        "tp2-pp2-vpp2": {TP: 2, PP: 2, VPP: 2},
        "tp2-pp4-E|t*2|t*2|L": {TP: 2, PP: 4, STAGES: "E|t*2|t*2|L"},
        "tp2-pp2-Ettt|tL": {TP: 2, PP: 2, STAGES: "Ettt|tL"} | SP,
        "cp2-tp2-pp2": {CP: 2, TP: 2, PP: 2} | SP,
    },
}
EXPERTS: Mapping[int, Mapping[str, Sizes]] = {
    4: {
        "tp1": {},
        "tp2": {TP: 2},
        "tp2-sp-etp1": {TP: 2, ETP: 1} | SP,
        "pp2-vpp2": {PP: 2, VPP: 2},
        "ep2": {EP: 2},
        "ep4": {EP: 4},
        "ep2-pp2": {EP: 2, PP: 2},
        "ep2-tp2-sp-etp1": {EP: 2, TP: 2, ETP: 1} | SP,
        "ep2-tp2-sp-etp2": {EP: 2, TP: 2, ETP: 2} | SP,
        "ep2-tp1-etp2": {EP: 2, TP: 1, ETP: 2},
        "pp4-E|tt|tt|L": {PP: 4, STAGES: "E|tt|tt|L"},
        "cp2-ep2": {CP: 2, EP: 2},
    },
    8: {
        "ep4-pp2": {EP: 4, PP: 2},
        "tp2-ep2-pp2": {TP: 2, EP: 2, PP: 2} | SP,
        "tp2-ep4-etp1-cp2": {TP: 2, EP: 4, ETP: 1, CP: 2} | SP,
        "tp2-ep2-etp4": {TP: 2, EP: 2, ETP: 4} | SP,
        "ep2-pp4-E|tt|tt|L": {EP: 2, PP: 4, STAGES: "E|tt|tt|L"},
    },
}
# A model that sees has no context parallelism: its images would have to be cut as their tokens are.
VISION: Mapping[int, Mapping[str, Sizes]] = {
    world_size: {name: sizes for name, sizes in layouts.items() if CP not in sizes}
    for world_size, layouts in DENSE.items()
}
# Prediction layers (m), as many as the model has, stand before the loss.
PREDICTION: Mapping[int, Mapping[str, Sizes]] = {
    world_size: {
        name.replace("|L", "|mL"): dict(sizes) | ({STAGES: sizes[STAGES].replace("L", "mL")} if STAGES in sizes else {})
        for name, sizes in layouts.items()
    }
    for world_size, layouts in EXPERTS.items()
}
KINDS: Mapping[str, Mapping[int, Mapping[str, Sizes]]] = {
    "dense": DENSE,
    "experts": EXPERTS,
    "vision": VISION,
    "prediction": PREDICTION,
}
"""The layouts of each kind of model."""
# In which gradients are compared too.
WITH_GRADIENTS = (
    *("tp2-sp", "tp4", "pp2-vpp2", "tp2-pp2", "cp2-tp2-sp", "cp2-ep2", "tp4-pp2", "cp2-tp2-pp2"),
    *("pp4-E|tt|tt|L", "pp4-E|tt|tt|mL"),
    *("ep2-pp2", "ep2-tp2-sp-etp1", "ep2-tp2-sp-etp2", "ep4-pp2", "tp2-ep2-pp2", "tp2-ep4-etp1-cp2"),
)
