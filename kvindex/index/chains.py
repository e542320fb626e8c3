"""Blocks and the chains they form, for the reference index: plain dictionaries, obviously right.

A *chain* belongs to one block size and one namespace. Its blocks hang in a tree under a root. A block whose parent is
not known hangs under a *stub*, which stands for "whatever block the engine calls this", and the whole subtree is
grafted into place when that block becomes known. A *name* is an engine key: in its key domain it denotes one prefix,
so at most one block in each chain size.
"""

from __future__ import annotations

from collections import OrderedDict

from kvindex.errors import IntegrityError
from kvindex.events.model import Extra
from kvindex.index.keys import chain


class Block:
    """One block of one chain, or the top of a chain (a root or a stub), which has no `parent`.

    `key` is None below a stub. `end` counts tokens from the top. `names` are (domain, engine key) pairs; `covered_by`
    the names of offloaded chunks that contain this block. `history` is what each (publisher, group) last said: (status,
    sequence, generation).
    """

    __slots__ = (
        "children",
        "covered_by",
        "end",
        "extra",
        "history",
        "key",
        "local",
        "names",
        "namespace",
        "parent",
        "size",
        "stub",
    )

    def __init__(self, size: int, parent: Block | None, local: int, key: int | None, end: int, extra: Extra) -> None:
        self.size = size
        self.parent = parent
        self.local = local
        self.key = key
        self.end = end
        self.extra = extra
        self.children: dict[int, Block] = {}
        self.names: set[tuple[Domain, int]] = set()
        self.covered_by: set[tuple[Domain, int]] = set()
        self.history: dict[tuple[int, int], tuple[str, int, int]] = {}
        self.namespace: tuple[str | None, str | None] = parent.namespace if parent else (None, None)
        self.stub: tuple[Domain, int] | None = None

    @property
    def top(self) -> Block:
        block = self
        while block.parent is not None:
            block = block.parent
        return block

    @property
    def is_top(self) -> bool:
        return self.parent is None


class Domain:
    """A key domain: inside it, equal engine keys mean equal prefixes.

    `settled`: it was compared with another domain (or stated), so it no longer looks for one to join.
    `references` counts residencies by engine key; a block without any is only remembered, not held.
    """

    def __init__(self, serial: int, label: str | None = None) -> None:
        self.serial = serial
        self.label = label
        self.settled = label is not None
        self.members = 0
        self.names: dict[int, dict[int, Block]] = {}
        self.provisional: set[tuple[int, int]] = set()
        self.references: dict[int, int] = {}
        self.covers: dict[int, dict[Block, None]] = {}  # in order: it decides what is forgotten first
        self.stubs: dict[tuple[int, int], Block] = {}


class Forest:
    """All chains. `by_key` finds an attached block by its block key; `sizes` counts block sizes in use.

    `max_forgotten` bounds how many blocks that nobody holds are remembered, so that their children still attach in the
    right place; the longest forgotten leaf goes first.
    """

    def __init__(self, max_forgotten: int) -> None:
        self.by_key: dict[int, Block] = {}
        self.roots: dict[tuple[int, str | None, str | None], Block] = {}
        self.orphans = 0
        self._forgotten: OrderedDict[Block, None] = OrderedDict()
        self._max_forgotten = max_forgotten

    def root(self, size: int, lora: str | None, salt: str | None, key: int) -> Block:
        found = self.roots.get((size, lora, salt))
        if found is None:
            found = self.roots[size, lora, salt] = Block(size, None, 0, key, 0, Extra())
            found.namespace = (lora, salt)
        return found

    def stub(self, domain: Domain, engine_key: int, size: int) -> Block:
        found = domain.stubs.get((engine_key, size))
        if found is None:
            found = domain.stubs[engine_key, size] = Block(size, None, 0, None, 0, Extra())
            found.stub = (domain, engine_key)
        return found

    def child(self, parent: Block, local: int, extra: Extra) -> Block:
        """The block after `parent` with this content, made when it is new."""
        found = parent.children.get(local)
        if found is None:
            key = None if parent.key is None else chain(parent.key, local)
            found = parent.children[local] = Block(parent.size, parent, local, key, parent.end + parent.size, extra)
            if key is None:
                self.orphans += 1
            else:
                self.by_key[key] = found
            self._forgotten[found] = None
        return found

    def name(self, domain: Domain, engine_key: int, block: Block, provisional: bool) -> None:
        """From now on `engine_key` denotes `block`; a stub waiting for it is grafted. An authoritative name replaces a
        provisional one (an offload event, which cannot say its salt or media), else the first stays."""
        sizes = domain.names.setdefault(engine_key, {})
        known = sizes.get(block.size)
        if known is not None and known is not block:
            if provisional or (engine_key, block.size) not in domain.provisional:
                return
            known.names.discard((domain, engine_key))
            self.release(known)
        sizes[block.size] = block
        block.names.add((domain, engine_key))
        if provisional and known is None:
            domain.provisional.add((engine_key, block.size))
        elif not provisional:
            domain.provisional.discard((engine_key, block.size))
        stub = domain.stubs.get((engine_key, block.size))
        if stub is not None and block.top is not stub:
            del domain.stubs[engine_key, block.size]
            self._graft(stub, block)

    def cover(self, domain: Domain, engine_key: int, block: Block) -> None:
        """The chunk called `engine_key` contains `block`."""
        block.covered_by.add((domain, engine_key))
        domain.covers.setdefault(engine_key, {})[block] = None

    def absorb(self, old: Domain, new: Domain) -> None:
        """Two domains turned out to be one: `old`'s names, chunks and stubs become `new`'s."""
        for engine_key, sizes in list(old.names.items()):
            for block in list(sizes.values()):
                self.name(new, engine_key, block, (engine_key, block.size) in old.provisional)
        for engine_key, blocks in old.covers.items():
            for block in blocks:
                self.cover(new, engine_key, block)
        for (engine_key, size), stub in list(old.stubs.items()):
            known = new.names.get(engine_key, {}).get(size)
            usable = known is not None and known.top is not stub  # a hostile block may name its own missing parent
            self._graft(stub, known if usable and known is not None else self.stub(new, engine_key, size))
        old.stubs.clear()
        for engine_key, count in old.references.items():
            new.references[engine_key] = new.references.get(engine_key, 0) + count
        old.references.clear()
        self.forget_domain(old)

    def forget_domain(self, domain: Domain) -> None:
        """Nobody uses this domain any more."""
        for engine_key, sizes in domain.names.items():
            for block in sizes.values():
                block.names.discard((domain, engine_key))
                self.release(block)
        for engine_key, blocks in domain.covers.items():
            for block in blocks:
                block.covered_by.discard((domain, engine_key))
                self.release(block)
        for stub in list(domain.stubs.values()):
            self._prune(stub)
        domain.names.clear()
        domain.covers.clear()
        domain.provisional.clear()
        domain.stubs.clear()

    def release(self, block: Block) -> None:
        """`block` may have lost its last holder: remember it, up to the bound."""
        if not self.is_held(block):
            self._forgotten[block] = None
            self._forgotten.move_to_end(block)

    @staticmethod
    def is_held(block: Block) -> bool:
        return any(domain.references.get(key) for domain, key in block.names | block.covered_by)

    def _graft(self, stub: Block, place: Block) -> None:
        """Move everything under `stub` to `place`, computing keys when the place is attached."""
        moves = [(orphan, place) for orphan in stub.children.values()]
        stub.children.clear()
        while moves:
            block, parent = moves.pop()
            target = parent.children.get(block.local)
            if target is None:
                target = parent.children[block.local] = block
                block.parent, block.end, block.namespace = parent, parent.end + parent.size, parent.namespace
                if parent.key is not None:
                    block.key = chain(parent.key, block.local)
                    self.by_key[block.key] = block
                    self.orphans -= 1
                moves += [(child, block) for child in block.children.values()]
                block.children = {}
            else:
                self._merge(block, target)
                moves += [(child, target) for child in block.children.values()]

    def _merge(self, block: Block, into: Block) -> None:
        for domain, engine_key in block.names:
            domain.names[engine_key][block.size] = into
            into.names.add((domain, engine_key))
        for domain, engine_key in block.covered_by:
            domain.covers[engine_key].pop(block, None)
            self.cover(domain, engine_key, into)
        for who, said in block.history.items():
            if who not in into.history or into.history[who][1] <= said[1]:
                into.history[who] = said
        block.names.clear()
        self._forgotten.pop(block, None)
        self.release(into)
        self.orphans -= block.key is None

    def _prune(self, top: Block) -> None:
        """Remove what nobody holds below `top`, leaves first."""
        below = [top]
        for block in below:
            below += block.children.values()
        for block in reversed(below[1:]):
            if not block.children and not self.is_held(block):
                self._remove(block)

    def settle(self) -> None:
        """After each batch: forget down to the bound."""
        tries = len(self._forgotten)
        while len(self._forgotten) > self._max_forgotten and tries > 0:
            tries -= 1
            block, _ = self._forgotten.popitem(last=False)
            if self.is_held(block):
                continue
            if block.children:
                self._forgotten[block] = None
                continue
            self._remove(block)

    def _remove(self, block: Block) -> None:
        self._forgotten.pop(block, None)
        for domain, engine_key in block.names:
            sizes = domain.names[engine_key]
            del sizes[block.size]
            domain.provisional.discard((engine_key, block.size))
            if not sizes:
                del domain.names[engine_key]
        for domain, engine_key in block.covered_by:
            domain.covers[engine_key].pop(block, None)
        parent = block.parent
        assert parent is not None
        del parent.children[block.local]
        if block.key is None:
            self.orphans -= 1
        else:
            del self.by_key[block.key]
        if parent.stub is not None and not parent.children:
            domain, engine_key = parent.stub
            domain.stubs.pop((engine_key, parent.size), None)

    def check(self) -> None:
        """Audit the trees, the key table and the names against each other."""
        orphans = 0
        seen: set[int] = set()
        tops = [*self.roots.values()]
        domains = {domain for block in self.by_key.values() for domain, _ in block.names}
        tops += [stub for domain in domains for stub in domain.stubs.values()]
        below = [block for top in tops for block in top.children.values()]
        for block in below:
            below += block.children.values()
            parent = block.parent
            if parent is None or parent.children.get(block.local) is not block or block.end != parent.end + block.size:
                raise IntegrityError(f"block {block.key} hangs wrongly under its parent")
            if parent.key is None:
                orphans += 1
            elif block.key != chain(parent.key, block.local) or self.by_key.get(block.key) is not block:
                raise IntegrityError(f"block {block.key} is not what its chain says")
            else:
                seen.add(block.key)
            for domain, engine_key in block.names:
                if domain.names.get(engine_key, {}).get(block.size) is not block:
                    raise IntegrityError(f"engine key {engine_key} does not lead back to its block")
        if seen != self.by_key.keys():
            raise IntegrityError("the key table and the chains name different blocks")
        if orphans > self.orphans:
            raise IntegrityError(f"{orphans} orphans found, {self.orphans} counted")
