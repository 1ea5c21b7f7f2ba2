"""How the demo model is made: the recipe of this package on made-up countries, from random weights.

The command is `python -m blockrag.finetune.demo --out DIR --seeds 0 1 2`.

    lines.py     what is trained on: the curriculum, and the lines of block fine-tuning
    recipe.py    the three runs of every seed
    table.py     what block fine-tuning gives, over seeds, question sets and modes
    release.py   the directory that ships
    __main__.py  the command

Import from the modules.
"""
