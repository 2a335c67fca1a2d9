"""Model families: how a published model is read, its tensors named, an image laid out.

``registry.py`` alone knows which families there are. A family is one small pure module; its vision
encoder, where it is new, is a module of ``graphs/modules``, its decoder a matter of flags.
"""
