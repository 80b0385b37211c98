"""The tiny base and recipes of the training tests."""

from training.conftest import base as base
from training.conftest import chats as chats
from training.conftest import encoder as encoder
from training.conftest import recipe_of as recipe_of
