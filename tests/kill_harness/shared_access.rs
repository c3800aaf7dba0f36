//! What the instruction that a tracee is about to execute does: does it touch the bus's shared memory, or the kernel?

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register, UsedMemory};
use libc::user_regs_struct;

use crate::tracer::{MARKER, Tracee};

/// Every segment of a bus has a name that begins so.
const SEGMENT: &str = "/memfd:shmbus";

/// Longest instruction of the architecture in bytes.
const MAX_INSTRUCTION_BYTES: usize = 15;

/// What an instruction does that others could notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    Private,
    /// Reads shared memory.
    Read,
    /// Writes shared memory (or reads and writes it).
    Write,
    /// Enters the kernel.
    SystemCall,
    /// Not executed: the operation is over.
    Marker,
}

/// Decodes the instructions of one tracee. Code does not change, so each address is decoded once.
pub(crate) struct Lens {
    segments: Vec<Range<u64>>,
    stale: bool,
    decoded: HashMap<u64, Decoded>,
    factory: InstructionInfoFactory,
}

enum Decoded {
    Plain,
    SystemCall,
    Marker,
    Touching(Vec<UsedMemory>),
}

impl Lens {
    pub(crate) fn new() -> Lens {
        Lens { segments: Vec::new(), stale: true, decoded: HashMap::new(), factory: InstructionInfoFactory::new() }
    }

    /// Whether any segment is mapped: before, it can be noticed in the kernel alone.
    pub(crate) fn has_segments(&mut self, tracee: &Tracee) -> bool {
        self.refresh(tracee);
        !self.segments.is_empty()
    }

    fn refresh(&mut self, tracee: &Tracee) {
        if self.stale {
            self.segments = segments(tracee);
            self.stale = false;
        }
    }

    /// It has entered the kernel unseen: it may have mapped or unmapped a segment.
    pub(crate) fn forget_segments(&mut self) {
        self.stale = true;
    }

    /// What the next instruction will do.
    pub(crate) fn look(&mut self, tracee: &Tracee, registers: &user_regs_struct) -> io::Result<Effect> {
        self.refresh(tracee);
        let Lens { decoded, factory, .. } = self;
        let decoded = decoded.entry(registers.rip).or_insert_with(|| decode(factory, tracee, registers.rip));
        Ok(match decoded {
            Decoded::Plain => Effect::Private,
            Decoded::Marker => Effect::Marker,
            Decoded::SystemCall => {
                self.stale = true;
                Effect::SystemCall
            }
            Decoded::Touching(memory) => effect(&self.segments, memory, registers),
        })
    }
}

fn segments(tracee: &Tracee) -> Vec<Range<u64>> {
    tracee.mappings().into_iter().filter(|(.., file)| file.starts_with(SEGMENT)).map(|(range, ..)| range).collect()
}

fn decode(factory: &mut InstructionInfoFactory, tracee: &Tracee, address: u64) -> Decoded {
    let mut bytes = [0; MAX_INSTRUCTION_BYTES];
    let len = tracee.read(address, &mut bytes);
    if bytes[..len].first() == Some(&MARKER) {
        return Decoded::Marker;
    }
    let instruction = Decoder::with_ip(64, &bytes[..len], address, DecoderOptions::NONE).decode();
    if instruction.code() == Code::Syscall {
        return Decoded::SystemCall;
    }
    // Implicit operands (string instructions, the stack) are among these.
    match factory.info(&instruction).used_memory() {
        [] => Decoded::Plain,
        memory => Decoded::Touching(memory.to_vec()),
    }
}

fn effect(segments: &[Range<u64>], memory: &[UsedMemory], registers: &user_regs_struct) -> Effect {
    let is_shared = |used: &&UsedMemory| {
        let address = used.virtual_address(0, |register, _, _| Some(value(register, registers)));
        address.is_some_and(|address| segments.iter().any(|segment| segment.contains(&address)))
    };
    let writes = |used: &UsedMemory| {
        matches!(used.access(), OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
    };
    let mut shared = memory.iter().filter(is_shared).peekable();
    if shared.peek().is_none() {
        return Effect::Private;
    }
    if shared.any(writes) { Effect::Write } else { Effect::Read }
}

/// A register's value; of a segment register, its base.
fn value(register: Register, registers: &user_regs_struct) -> u64 {
    let full = match register.full_register() {
        Register::RAX => registers.rax,
        Register::RBX => registers.rbx,
        Register::RCX => registers.rcx,
        Register::RDX => registers.rdx,
        Register::RSI => registers.rsi,
        Register::RDI => registers.rdi,
        Register::RBP => registers.rbp,
        Register::RSP => registers.rsp,
        Register::R8 => registers.r8,
        Register::R9 => registers.r9,
        Register::R10 => registers.r10,
        Register::R11 => registers.r11,
        Register::R12 => registers.r12,
        Register::R13 => registers.r13,
        Register::R14 => registers.r14,
        Register::R15 => registers.r15,
        Register::FS => registers.fs_base,
        Register::GS => registers.gs_base,
        // The others are based at 0, and displacements to the instruction pointer are resolved already.
        _ => 0,
    };
    if register.size() == 4 && !register.is_segment_register() { full & u64::from(u32::MAX) } else { full }
}
