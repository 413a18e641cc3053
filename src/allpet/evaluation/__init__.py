"""Is a set of generated sinograms as good as a set of real ones? Numbers, each with its real-versus-real floor.

``suite.evaluate`` puts together what the other modules measure one by one: ``features`` and ``distances`` between
distributions, ``spectra`` and histograms, ``copies`` of training slices up to symmetries, ``classifier`` and
``utility`` for what samples are good for.
"""

from allpet.evaluation.suite import Evaluation, evaluate, verdict

__all__ = ["Evaluation", "evaluate", "verdict"]
