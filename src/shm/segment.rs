//! Segments: the sole owner of mappings (ARCHITECTURE.md §3.1).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::uio::pread;

use crate::error::AttachError;
use crate::os::memfd;
use crate::ring::arena::Arena;
use crate::ring::slot::Ring;
use crate::shm::layout::{BODY_OFFSET, Geometry, LAYOUT_VERSION};
use crate::shm::shared::Shared;

const MAGIC: u64 = u64::from_le_bytes(*b"SHMBUS\0\x01");

/// What memory is reserved in multiples of: whole pages, of any machine.
const PIECE_BYTES: u64 = 1 << 16;

/// What a segment is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Log = 2,
    Cursors = 3,
    Arena = 4,
    Channel = 5,
    Ledger = 6,
    Notice = 7,
}

/// What a segment promises; written at creation, compared at attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Promise {
    pub(crate) kind: Kind,
    pub(crate) len_bytes: u64,
    pub(crate) bus: u64,
    pub(crate) topic: u64,
    pub(crate) index: u32,
    pub(crate) generation: u32,
    pub(crate) geometry: Geometry,
}

/// How a segment is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    ReadOnly,
    ReadWrite,
}

/// When the pages of a mapping come into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    /// At once: a page fault on the first lap would cost more than a whole lap later.
    Populated,
    AsTouched,
}

#[derive(Default)]
#[repr(C)]
struct Header {
    magic: AtomicU64,
    layout: AtomicU32,
    kind: AtomicU32,
    len_bytes: AtomicU64,
    bus: AtomicU64,
    topic: AtomicU64,
    index: AtomicU32,
    generation: AtomicU32,
    slots: AtomicU64,
    slot_bytes: AtomicU32,
    unit_bits: AtomicU32,
    arena_bytes: AtomicU64,
}

const _: () = assert!(size_of::<Header>() == 72);

/// A mapped segment. A clone is the same mapping.
#[derive(Clone)]
pub(crate) struct Segment {
    map: Arc<MmapRaw>,
}

impl Segment {
    /// Creates and maps a segment, reserved in full and zeroed. It can be attached once it is formatted and
    /// [`Self::publish`]ed.
    pub(crate) fn create(name: &str, promise: &Promise) -> std::io::Result<(OwnedFd, Segment)> {
        let fd = memfd::create(name, promise.len_bytes)?;
        let segment = Segment::map(fd.as_fd(), promise.len_bytes, Access::ReadWrite, Pages::Populated)?;
        Ok((fd, segment))
    }

    /// Writes the header, the magic last (I-1).
    pub(crate) fn publish(&self, promise: &Promise) {
        self.header().write(promise);
    }

    /// Maps a segment after checking that it is what was promised (I-1).
    pub(crate) fn attach(fd: BorrowedFd<'_>, promise: &Promise, access: Access) -> Result<Segment, AttachError> {
        Segment::attach_with(fd, promise, access, Pages::Populated)
    }

    /// The same to store a few words: takes as long for the longest segment as for the shortest.
    pub(crate) fn attach_for_a_word(fd: BorrowedFd<'_>, promise: &Promise) -> Result<Segment, AttachError> {
        Segment::attach_with(fd, promise, Access::ReadWrite, Pages::AsTouched)
    }

    /// [`Self::attach`], its pages coming as said.
    pub(crate) fn attach_with(
        fd: BorrowedFd<'_>,
        promise: &Promise,
        access: Access,
        pages: Pages,
    ) -> Result<Segment, AttachError> {
        let len = checked_len(fd)?;
        expect("length", len, promise.len_bytes)?;
        // First a copy: to populate what is none of ours would cost its length.
        Header::copied(fd)?.check(promise)?;
        let segment = Segment::map(fd, len, access, pages)
            .map_err(|source| AttachError::Io { context: "cannot map the segment", source })?;
        segment.header().check(promise)?;
        Ok(segment)
    }

    fn map(fd: BorrowedFd<'_>, len: u64, access: Access, pages: Pages) -> std::io::Result<Segment> {
        // Whoever maps a segment may ring a doorbell in it.
        crate::os::membarrier::register();
        let mut options = MmapOptions::new();
        options.len(len as usize);
        if pages == Pages::Populated {
            options.populate();
        }
        let raw = fd.as_raw_fd();
        let map = match access {
            Access::ReadOnly => options.map_raw_read_only(raw)?,
            Access::ReadWrite => options.map_raw(raw)?,
        };
        Ok(Segment { map: Arc::new(map) })
    }

    fn header(&self) -> &Header {
        // SAFETY: every mapping is at least a page long, page-aligned, and `Header` is 72 bytes of atomics.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    /// A view of one `T` at `offset` in the body.
    ///
    /// `T` must be made of atomics only; every caller names one of the layout's structs.
    pub(crate) fn view<T: Sync>(&self, offset: u64) -> Shared<T> {
        self.assert_inside(offset, size_of::<T>() as u64, align_of::<T>());
        let target = self.body(offset).cast::<T>();
        // SAFETY: inside the mapping and aligned (just checked); `map` keeps it alive (I-11).
        unsafe { Shared::new(target, self.map.clone()) }
    }

    /// A view of `len` `T`s from `offset` in the body on.
    pub(crate) fn view_slice<T: Sync>(&self, offset: u64, len: u64) -> Shared<[T]> {
        self.assert_inside(offset, size_of::<T>() as u64 * len, align_of::<T>());
        let target = NonNull::slice_from_raw_parts(self.body(offset).cast::<T>(), len as usize);
        // SAFETY: as in `view`.
        unsafe { Shared::new(target, self.map.clone()) }
    }

    /// A ring of `slots` at `offset` in the body.
    pub(crate) fn ring<S: Sync>(&self, offset: u64, slots: u64) -> Ring<S> {
        Ring::new(self.view_slice(offset, slots))
    }

    /// The arena at `offset` in the body.
    pub(crate) fn arena(&self, offset: u64, bytes: u64) -> Arena {
        Arena::new(self.view_slice::<AtomicU64>(offset, bytes / 8))
    }

    fn body(&self, offset: u64) -> NonNull<u8> {
        // SAFETY: `assert_inside` has shown that the body has this offset; a mapping is never null.
        unsafe { NonNull::new_unchecked(self.map.as_mut_ptr().add((BODY_OFFSET + offset) as usize)) }
    }

    fn assert_inside(&self, offset: u64, bytes: u64, align: usize) {
        let end = BODY_OFFSET + offset + bytes;
        assert!(end <= self.map.len() as u64, "a view ends at {end}, the segment at {}", self.map.len());
        assert!(offset.is_multiple_of(align as u64), "a view at {offset} is not aligned to {align}");
    }
}

/// A segment in the making. Its memory is reserved piece by piece, so that its maker can serve others in between.
pub(crate) struct NewSegment {
    fd: OwnedFd,
    segment: Segment,
    pages: Pages,
    reserved_bytes: u64,
}

impl NewSegment {
    pub(crate) fn begin(name: &str, len: u64, pages: Pages) -> std::io::Result<NewSegment> {
        let fd = memfd::begin(name, len)?;
        let segment = Segment::map(fd.as_fd(), len, Access::ReadWrite, Pages::AsTouched)?;
        Ok(NewSegment { fd, segment, pages, reserved_bytes: 0 })
    }

    pub(crate) fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes
    }

    pub(crate) fn missing_bytes(&self) -> u64 {
        self.segment.map.len() as u64 - self.reserved_bytes
    }

    /// What there is of it; beyond what is reserved nothing may be touched.
    pub(crate) fn segment(&self) -> &Segment {
        &self.segment
    }

    /// Reserves `bytes` more, rounded up to whole pieces, or what is missing.
    pub(crate) fn reserve(&mut self, bytes: u64) -> std::io::Result<()> {
        let piece = self.missing_bytes().min(bytes.div_ceil(PIECE_BYTES) * PIECE_BYTES);
        if piece == 0 {
            return Ok(());
        }
        memfd::reserve(self.fd.as_fd(), self.reserved_bytes, piece)?;
        if self.pages == Pages::Populated {
            // Where the kernel cannot (before Linux 5.14) they come as they are touched.
            let _ = self.segment.map.advise_range(Advice::PopulateWrite, self.reserved_bytes as usize, piece as usize);
        }
        self.reserved_bytes += piece;
        Ok(())
    }

    /// The segment, reserved in full and zeroed. It can be attached once it is formatted and [`Segment::publish`]ed.
    pub(crate) fn finish(mut self) -> std::io::Result<(OwnedFd, Segment)> {
        self.reserve(self.missing_bytes())?;
        Ok((self.fd, self.segment))
    }
}

impl Header {
    /// What a segment says before it is mapped.
    fn copied(fd: BorrowedFd<'_>) -> Result<Header, AttachError> {
        let mut header = Header::default();
        // SAFETY: a header is 72 bytes of atomics without padding, of which any bits are valid, and nobody else has this one.
        let bytes = unsafe { std::slice::from_raw_parts_mut((&raw mut header).cast::<u8>(), size_of::<Header>()) };
        match pread(fd, bytes, 0) {
            Ok(read) if read == size_of::<Header>() => Ok(header),
            Ok(read) => Err(AttachError::TooSmall { found: read as u64, min: size_of::<Header>() as u64 }),
            Err(errno) => Err(AttachError::Io { context: "cannot read the segment's header", source: errno.into() }),
        }
    }

    fn write(&self, promise: &Promise) {
        let relaxed = Ordering::Relaxed;
        self.layout.store(LAYOUT_VERSION, relaxed);
        self.kind.store(promise.kind as u32, relaxed);
        self.len_bytes.store(promise.len_bytes, relaxed);
        self.bus.store(promise.bus, relaxed);
        self.topic.store(promise.topic, relaxed);
        self.index.store(promise.index, relaxed);
        self.generation.store(promise.generation, relaxed);
        self.slots.store(promise.geometry.slots, relaxed);
        self.slot_bytes.store(promise.geometry.slot_bytes, relaxed);
        self.unit_bits.store(promise.geometry.unit_bits, relaxed);
        self.arena_bytes.store(promise.geometry.arena_bytes, relaxed);
        // Release: R-MAGIC pairs with A-MAGIC (check_version): the magic vouches for the rest.
        self.magic.store(MAGIC, Ordering::Release);
    }

    fn check_version(&self) -> Result<(), AttachError> {
        // Acquire: A-MAGIC pairs with R-MAGIC (write).
        let magic = self.magic.load(Ordering::Acquire);
        if magic != MAGIC {
            return Err(AttachError::Magic { found: magic, expected: MAGIC });
        }
        let layout = self.layout.load(Ordering::Relaxed);
        if layout != LAYOUT_VERSION {
            return Err(AttachError::Version { found: layout, expected: LAYOUT_VERSION });
        }
        Ok(())
    }

    fn check(&self, promise: &Promise) -> Result<(), AttachError> {
        self.check_version()?;
        let relaxed = Ordering::Relaxed;
        expect("kind", self.kind.load(relaxed).into(), promise.kind as u64)?;
        expect("len_bytes", self.len_bytes.load(relaxed), promise.len_bytes)?;
        expect("bus", self.bus.load(relaxed), promise.bus)?;
        expect("topic", self.topic.load(relaxed), promise.topic)?;
        expect("index", self.index.load(relaxed).into(), promise.index.into())?;
        expect("generation", self.generation.load(relaxed).into(), promise.generation.into())?;
        expect("slots", self.slots.load(relaxed), promise.geometry.slots)?;
        expect("slot_bytes", self.slot_bytes.load(relaxed).into(), promise.geometry.slot_bytes.into())?;
        expect("unit_bits", self.unit_bits.load(relaxed).into(), promise.geometry.unit_bits.into())?;
        expect("arena_bytes", self.arena_bytes.load(relaxed), promise.geometry.arena_bytes)
    }
}

fn expect(field: &'static str, found: u64, expected: u64) -> Result<(), AttachError> {
    if found == expected { Ok(()) } else { Err(AttachError::Field { field, found, expected }) }
}

/// The descriptor's size, if it is sealed so that it keeps it.
fn checked_len(fd: BorrowedFd<'_>) -> Result<u64, AttachError> {
    let io = |context| move |errno: nix::errno::Errno| AttachError::Io { context, source: errno.into() };
    let len = nix::sys::stat::fstat(fd).map_err(io("cannot stat the segment"))?.st_size as u64;
    if len < BODY_OFFSET {
        return Err(AttachError::TooSmall { found: len, min: BODY_OFFSET });
    }
    let needed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(io("not a memfd: cannot read the segment's seals"))?;
    if seals & needed.bits() != needed.bits() {
        return Err(AttachError::NotSealed { found: seals as u32, expected: needed.bits() as u32 });
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::stat::fstat;

    use super::*;

    const LEN: u64 = 4 << 20;

    /// A segment whose owner has given its body back to the kernel: populated, it takes memory again.
    fn punched(promise: &Promise) -> OwnedFd {
        let (fd, segment) = Segment::create("shmbus-test", promise).unwrap();
        segment.publish(promise);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&fd, flags, BODY_OFFSET as i64, (LEN - BODY_OFFSET) as i64).unwrap();
        fd
    }

    fn is_populated(fd: &OwnedFd) -> bool {
        fstat(fd).unwrap().st_blocks as u64 * 512 >= LEN
    }

    #[test]
    fn a_segment_is_made_of_pieces() {
        let geometry = Geometry { slots: 1024, slot_bytes: 64, unit_bits: 0, arena_bytes: 4096 };
        let len_bytes = (1 << 20) + 4096;
        let promise = Promise { kind: Kind::Log, len_bytes, bus: 7, topic: 1, index: 0, generation: 0, geometry };
        for pages in [Pages::Populated, Pages::AsTouched] {
            let mut new = NewSegment::begin("shmbus-test", len_bytes, pages).unwrap();
            assert_eq!((new.reserved_bytes(), memfd::held_bytes(new.fd.as_fd())), (0, 0));
            new.reserve(1).unwrap();
            assert_eq!(memfd::held_bytes(new.fd.as_fd()), new.reserved_bytes());
            new.reserve((1 << 19) + 1).unwrap();
            assert!(new.reserved_bytes() > 1 << 19 && new.missing_bytes() > 1 << 18);
            assert!(memfd::check_sealed(new.fd.as_fd()).is_ok(), "nobody can make it shorter meanwhile");
            let (fd, segment) = new.finish().unwrap();
            assert_eq!(memfd::held_bytes(fd.as_fd()), len_bytes);
            segment.publish(&promise);
            Segment::attach(fd.as_fd(), &promise, Access::ReadOnly).unwrap();
        }
    }

    #[test]
    fn only_what_was_promised_is_populated() {
        let geometry = Geometry { slots: 1024, slot_bytes: 64, unit_bits: 0, arena_bytes: 4096 };
        let promise = Promise { kind: Kind::Log, len_bytes: LEN, bus: 7, topic: 1, index: 0, generation: 0, geometry };
        let fd = punched(&promise);
        let other = Segment::attach(fd.as_fd(), &Promise { topic: 2, ..promise }, Access::ReadWrite);
        assert!(matches!(other, Err(AttachError::Field { field: "topic", found: 1, expected: 2 })));
        assert!(!is_populated(&fd), "its header shows that it is another's");
        Segment::attach_for_a_word(fd.as_fd(), &promise).unwrap();
        assert!(!is_populated(&fd), "one word needs one page");
        Segment::attach(fd.as_fd(), &promise, Access::ReadWrite).unwrap();
        assert!(is_populated(&fd));
    }
}
