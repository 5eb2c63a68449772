"""fiveply: data, tensor, pipeline, context and expert parallelism for language models, in one object, the Layout."""

__version__ = "0.1.0"
