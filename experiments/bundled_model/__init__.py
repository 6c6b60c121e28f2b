"""Recipe of the bundled model: corpus, tokenizer, training, evaluation and model card.

Run the steps in order, from any directory::

    python -m moeless.experiments.bundled_model.train --data DIR --work DIR
    python -m moeless.experiments.bundled_model.card --data DIR --work DIR --out moeless/assets/model

``--data`` holds the text files that ``corpus.py`` names; they are public and are not shipped.
"""
