"""Trained models in use."""

from asynctrain.inference.classifier import Classifier, Prediction
from asynctrain.inference.evaluate import Evaluation

__all__ = ["Classifier", "Evaluation", "Prediction"]
