"""The measuring stick behind `blockrag bench`: times, rates and memory on this machine, with anyone's model.

    shapes.py     models to measure with: shapes with random weights, or a checkpoint
    prompts.py    prompts of random tokens
    stores.py     the same blocks in every store that is compared
    machine.py    where it ran, and the rates this machine reaches
    frame.py      what every result says besides its numbers; samples to median, spread and fit
    bounds.py     what no implementation can be faster than here, and the FLOPs
    forward.py    a forward behind a cache, and transformers' own attention, for comparison
    seed.py       composing as the method's published code does it
    ways.py       the ways to a first token
    steps.py      the steps to a first token, one at a time
    retrieval.py  the search that comes before
    ttft.py, decode.py, prebuild.py, compose.py, memory.py   one benchmark each
    report.py     results as files; tables.py and text.py: as Markdown; plots.py: as pictures

Each benchmark is a function from a subject and its settings to one JSON-ready dictionary. Import from the modules;
this package stays empty so that one does not load what another needs.
"""
