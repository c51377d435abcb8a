"""Sets that tensorflow-datasets prepared, read and written without TensorFlow."""
