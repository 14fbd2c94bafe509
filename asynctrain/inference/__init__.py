"""Trained models in use."""

from asynctrain.inference.classifier import Classifier, Prediction
from asynctrain.inference.evaluate import Evaluation, Metric

__all__ = ["Classifier", "Evaluation", "Metric", "Prediction"]
