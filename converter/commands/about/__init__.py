"""Commands that tell what there is: architectures, profiles, this machine."""
