"""What a model's text says: a permutation, scores or words, with every repair recorded as a defect.

No text makes a parser fail. A text that answers nothing (empty, a refusal, no answer in it) gives `None`, never a
ranking made up by the repairs, and callers turn that into a missing label. Each parser reads the answer that follows a
text's reasoning. Patterns are possessive (`++`): a model may repeat one character a thousand times, and no such text
may cost more than its length.
"""
