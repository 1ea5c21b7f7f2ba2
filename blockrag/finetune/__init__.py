"""Block fine-tuning: teaching a language model to read passages that do not see each other (arXiv 2409.15355).

    data/         data sets to training lines: reading, ranking, sampling, answering
    samples.py    a training line as token ids: shared blocks, and questions as independent final blocks
    rows.py       samples in both attentions, as the rows of batches
    reading.py    data files to samples and rows; what is too long
    collate.py    rows to tensors; the mask comes from `blockrag.attention`
    loss.py       which tokens count, and how they are averaged
    settings.py   every number of a run, and the published recipes by name
    steps.py      how long a run is, in steps and tokens
    arguments.py  the settings as the Trainer's arguments, learning rates included
    placing.py    device, processes, dtypes and attention of a run
    adapters.py   low-rank adapters around a model
    muon.py       Muon, beside AdamW, as one optimizer
    trainer.py    the transformers Trainer with this collator, this loss and an evaluation of both attentions
    scoring.py    exact match without generating: the likelihood of the answers, many questions to a forward
    facts.py      what a fine-tuned model will say of itself: its template, and how far it was trained
    saving.py     what a fine-tuned directory holds
    gathering.py  the end of a run: from all processes to one directory
    resuming.py   what a run is, and whether it may go on from a checkpoint
    run.py        `finetune`: all of it, from a model and files to a directory
    plan.py       what a run would be, without training
    progress.py   the course of a run as lines
    plots.py      the course of a run as a picture

Import from the modules; this package stays empty so that reading data does not load torch.
"""
