"""Is a set of generated sinograms as good as a set of real ones? Numbers, each with its real-versus-real floor.

``suite.evaluate`` puts together what the other modules measure one by one: ``features`` and ``distances`` between
distributions, ``spectra`` and histograms, ``copies`` of training slices up to symmetries, and a ``classifier`` that
tells whether prompts are obeyed; ``halves`` are the sets of the floor. ``naming.naming_numbers`` trains classifiers on
samples and on real slices; ``utility.denoising_utility`` does so with small denoisers.
"""

from allpet.evaluation.suite import Evaluation, evaluate
from allpet.evaluation.utility import Utility, denoising_utility
from allpet.evaluation.verdicts import meaning, verdict

__all__ = ["Evaluation", "Utility", "denoising_utility", "evaluate", "meaning", "verdict"]
