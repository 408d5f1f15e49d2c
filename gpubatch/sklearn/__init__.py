"""For scikit-learn: its ``MLPClassifier`` and ``MLPRegressor``, trained by gpubatch.

``from gpubatch.sklearn import MLPClassifier`` takes the place of ``from sklearn.neural_network import MLPClassifier``.
Arguments, defaults, attributes, errors and random numbers are scikit-learn's: with the same ``random_state`` the
weights are scikit-learn's up to rounding. More arguments choose the device, any update rule, batch normalisation and
dropout. It needs scikit-learn 1.6: ``pip install "gpubatch[sklearn]"``.
"""

from gpubatch.sklearn.estimators import MLPClassifier, MLPRegressor

__all__ = ["MLPClassifier", "MLPRegressor"]
