"""Recipes: a model's published configuration, a layout over ranks, and the settings of a run, one module a model size.

Making one reads no file and asks no hub. Every value can be changed afterwards, in Python or by a word of the command.

    import weightcast.trainer.recipes.llama.llama32_1b as llama32_1b

    cfg = llama32_1b.pretrain_config()
    cfg.train.train_iters = 10
"""
