"""What the shop's payment provider may answer."""


class Declined(Exception):  # the name that a shop gives it
    """The provider does not pay; no money has gone."""
