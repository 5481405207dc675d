"""What users are told."""


def is_one_sentence(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("kclib: ") and "Traceback" not in text
