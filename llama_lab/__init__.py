"""llama_lab: fine-tune Llama-2 with QLoRA and know which settings are best."""

__version__ = "0.1.0"
