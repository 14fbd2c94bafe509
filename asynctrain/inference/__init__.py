"""Trained models in use."""

from asynctrain.inference.classifier import Classifier, Prediction
from asynctrain.inference.evaluate import EvaluationResult, Metric

__all__ = ["Classifier", "EvaluationResult", "Metric", "Prediction"]
