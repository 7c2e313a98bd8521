"""Parts of ready workloads: file formats, splits and damage, small networks, the paper's settings."""

from dit_mlflow.examples.classification import Captions, accuracy, classification, notes, sample_losses
from dit_mlflow.examples.corruption import Corrupted, Damage, corrupt
from dit_mlflow.examples.data_files import download_folder, folder_of, labelled_images, no_larger, read_idx, torchvision
from dit_mlflow.examples.images import Standardise, image_workload, standardised
from dit_mlflow.examples.networks import NetworkName, network, resnet9
from dit_mlflow.examples.recipe import Decay, OptimizerName, Preset, Recipe, build_optimizer, inverse_sqrt, recipe_for
from dit_mlflow.examples.splits import Labelled, Splits, of_classes, split

__all__ = [
    "Captions",
    "Corrupted",
    "Damage",
    "Decay",
    "Labelled",
    "NetworkName",
    "OptimizerName",
    "Preset",
    "Recipe",
    "Splits",
    "Standardise",
    "accuracy",
    "build_optimizer",
    "classification",
    "corrupt",
    "download_folder",
    "folder_of",
    "image_workload",
    "inverse_sqrt",
    "labelled_images",
    "network",
    "no_larger",
    "notes",
    "of_classes",
    "read_idx",
    "recipe_for",
    "resnet9",
    "sample_losses",
    "split",
    "standardised",
    "torchvision",
]
