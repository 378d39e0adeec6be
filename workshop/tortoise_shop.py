"""Tables of the shop as models of Tortoise ORM, which finds its models by module."""

from __future__ import annotations

from tortoise import fields
from tortoise.models import Model


class Product(Model):
    """One product of the range."""

    sku = fields.IntField(primary_key=True, generated=False)
    title = fields.TextField(null=True)
    department = fields.TextField()
    category = fields.TextField(null=True)
    brand = fields.TextField()
    manufacturer_id = fields.IntField()
    package_size = fields.TextField(null=True)
    unit_price = fields.DecimalField(max_digits=10, decimal_places=2, null=True)

    class Meta:
        """The table's name."""

        table = "products"


class Order(Model):
    """An order that a household places."""

    id = fields.IntField(primary_key=True)
    household_id = fields.IntField()
    status = fields.TextField(default="new")

    class Meta:
        """The table's name."""

        table = "orders"


class OrderLine(Model):
    """One product of an order, at the price of that moment."""

    id = fields.IntField(primary_key=True)
    order_id = fields.IntField()
    sku = fields.IntField()
    quantity = fields.IntField(default=1)
    unit_price = fields.DecimalField(max_digits=10, decimal_places=2)

    class Meta:
        """The table's name."""

        table = "order_lines"
