//! Memory to put arguments in, the making of one call, and putting things right after it.

use crate::shape::{Answer, Class, Form, Part, Place, Shape, Target, Way};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;
use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackOp, CallbackRegister, CallbackType, TrapInfo};
use guests::abi::context::{VcpuContext, flags};
use guests::abi::grant::{Entry, GrantOp, MapGrantRef, SetupTable, UnmapGrantRef, entry, map};
use guests::abi::mmu::MmuextCommand;
use guests::abi::{Hypercall, domid};
use guests::memory::{self, PAGE, Pages, Window};
use guests::probe::{self, Registers, address, address_mut, call, mmuext};
use guests::tables::Chain;
use guests::{code, events, hypercall, own_number, pattern};
use unikernel::{control, time, traps};

/// Pages for one structure: the longest is a vcpu's first state, of more than one page.
const PART: u64 = 3;
/// Structures of a call.
const PARTS: u64 = 3;
/// The machine-to-physical table, and the hypervisor's own memory (core 2.1).
const HYPERVISOR: [u64; 2] = [0xffff_8000_0000_0000, 0xffff_8300_0000_0000];
const NOT_CANONICAL: [u64; 2] = [0x0000_8000_0000_0000, 0x8000_0000_0000_0000];
/// What registers of 32 bits hold above them.
const HIGH_BITS: u64 = 0x8765_4321_0000_0000;
/// The reference that the ground grants to its own domain.
pub(crate) const GREF: u32 = 8;

pub(crate) struct Ground {
    /// The domain has authority over others.
    pub(crate) privileged: bool,
    /// The first domain, whatever it may do.
    pub(crate) first: bool,
    /// It has none, and there are others.
    pub(crate) subject: bool,
    /// It may use the machine's console.
    pub(crate) console: bool,
    /// The hypervisor is Xen.
    pub(crate) xen: bool,
    /// The domain's number.
    pub(crate) own: u16,
    /// A domain it has made, if it may.
    pub(crate) child: u16,
    /// One that is to be destroyed.
    spare: Cell<u16>,
    /// Four levels of page tables, ready to be pinned.
    pub(crate) chain: Chain,
    /// Two plain pages; the second is granted.
    pub(crate) scratch: Pages,
    /// A page of empty descriptors.
    pub(crate) descriptors: Pages,
    /// Addresses where nothing is mapped, with tables.
    pub(crate) window: Window,
    /// Ports that stay open.
    ports: Vec<u32>,
    /// The handle of what is mapped in the window.
    handle: Cell<u32>,
    good: Pages,
    read_only: Pages,
    /// Its last page is not mapped.
    edge: Pages,
    _grants: Window,
}

impl Ground {
    pub(crate) fn new(privileged: bool, first: bool) -> Self {
        let extra = hypercall::extraversion().expect("there is a name");
        let pages = |count| Pages::allocate(count).expect("pages are free");
        let own = own_number();
        let (chain, scratch, descriptors) = (Chain::new(), pages(2), pages(1));
        chain.protect(4);
        descriptors.set_writable(0, false).expect("a page can be made read-only");
        let mut frames = [0u64];
        let frame_list = address_mut(&mut frames);
        let mut setup = [SetupTable { dom: domid::SELF, nr_frames: 1, frame_list, ..SetupTable::default() }];
        let op = GrantOp::SetupTable.number();
        call(Hypercall::GrantTableOp, [op, address_mut(&mut setup), 1, 0, 0]).expect("there is a table");
        let grants = Window::map(&frames, domid::SELF, true).expect("the table is shown to its owner");
        let frame = u32::try_from(scratch.frame(1).expect("the page is ours")).expect("a small machine");
        let granted = Entry { flags: entry::PERMIT_ACCESS, domid: own, frame };
        probe::store_bytes(grants.address() + u64::from(GREF) * 8, zerocopy::IntoBytes::as_bytes(&granted));
        let ground = Self {
            privileged,
            first,
            subject: !privileged && own != 0,
            console: own == 0,
            xen: !extra.windows(5).any(|word| word == b"tenon"),
            own,
            child: if privileged { make_child() } else { 0 },
            spare: Cell::new(0),
            chain,
            scratch,
            descriptors,
            window: Window::reserve(2).expect("there is room"),
            ports: (1..64).filter(|port| is_open(*port)).collect(),
            handle: Cell::new(u32::MAX),
            good: pages(PART * PARTS),
            read_only: pages(PART),
            edge: pages(PART + 1),
            _grants: grants,
        };
        ground.restore_pages();
        ground
    }

    /// One answer for those with authority, another for those without.
    pub(crate) fn either<T>(&self, privileged: T, otherwise: T) -> T {
        if self.privileged { privileged } else { otherwise }
    }

    /// A domain that is there until the call is over, if there can be one.
    pub(crate) fn spare(&self) -> u16 {
        if self.privileged && self.spare.get() == 0 {
            self.spare.set(make_domain());
        }
        self.spare.get()
    }

    /// A port that waits for ourselves.
    pub(crate) fn port(&self) -> u32 {
        hypercall::allocate_unbound(domid::SELF, domid::SELF).expect("a port is free")
    }

    /// A frame of ours, lost to us: not mapped any more, to be given back.
    pub(crate) fn lost_frame(&self) -> u64 {
        let page = Pages::allocate(1).expect("a page is free");
        let frame = page.frame(0).expect("the page is ours");
        probe::update_va_mapping(page.leak(), 0, 2).expect("a page can be unmapped");
        frame
    }

    /// Every page of the ground as it was.
    fn restore_pages(&self) {
        for (pages, writable) in [(&self.good, true), (&self.read_only, false), (&self.edge, true)] {
            for i in 0..pages.count() {
                pages.set_writable(i, writable).expect("a plain page");
            }
        }
        probe::update_va_mapping(self.edge_end(), 0, 2).expect("a page can be unmapped");
    }

    /// The first address behind the last page that is mapped.
    fn edge_end(&self) -> u64 {
        self.edge.address() + PART * PAGE
    }

    /// The address for part `i` when it is bent as `class` says, in the `variant`th way, or good (`None`).
    fn choose(&self, i: usize, part: &Part, bent: Option<(Class, usize)>) -> u64 {
        let good = part.good.unwrap_or(self.good.address() + i as u64 * PART * PAGE);
        let length = part.bytes.len() as u64;
        let Some((class, variant)) = bent else { return good };
        match class {
            Class::Null => 0,
            Class::Unmapped => self.edge_end(),
            Class::ReadOnly => self.read_only.address(),
            Class::Misaligned => good + if part.form == Form::Machine { 4 } else { 1 },
            Class::Hypervisor => HYPERVISOR[variant],
            Class::NotCanonical => NOT_CANONICAL[variant],
            // Half of it is missing, or only the last byte.
            Class::PageEnd if part.bytes.is_empty() => self.edge_end() - if variant == 0 { 4 } else { 1 },
            Class::PageEnd if part.low != 0 => self.edge_end() - length / 2,
            Class::PageEnd => self.edge_end() - if variant == 0 { length / 2 } else { length - 1 },
            Class::Domain | Class::HighBits => good,
            Class::Count => self.edge_end() - part.bytes.len() as u64,
        }
    }

    /// Makes a call with trial `n` of `class`; its answer, and where its first structure lay.
    pub(crate) fn make(&self, target: &Target, shape: &mut Shape, class: Class, n: usize) -> (Made, u64) {
        let number = match class {
            Class::Domain => Some(&shape.domains[n]),
            Class::Count => Some(&shape.counts[n]),
            _ => None,
        };
        let number = number.map(|number| (number.place, number.value));
        let count = shape.parts.len().max(1);
        let places: Vec<u64> = (0..)
            .zip(&shape.parts)
            .map(|(i, part)| {
                let bent = match class {
                    Class::Domain | Class::HighBits => None,
                    Class::Count if i == 0 => Some((class, 0)),
                    Class::Count => None,
                    _ if i == n % count => Some((class, n / count)),
                    _ => None,
                };
                self.choose(i, part, bent)
            })
            .collect();
        for (i, at) in places.iter().enumerate() {
            let (place, form, low) = (shape.parts[i].place, shape.parts[i].form, shape.parts[i].low);
            let at = if form == Form::Machine { machine_address(*at) } else { *at };
            put(shape, place, at | low);
        }
        if let Some((place, value)) = number {
            put(shape, place, value);
        }
        if class == Class::HighBits {
            shape.args[shape.words[n]] |= HIGH_BITS;
        }
        for (part, at) in shape.parts.iter().zip(&places) {
            self.lay(*at, &part.bytes);
        }
        let first = places.first().copied().unwrap_or_default();
        let made = match shape.way {
            Way::Call => Made::Answered(probe::call_number(target.call.number(), shape.args)),
            Way::Iret => {
                let registers = Registers { rsp: first, ..pattern() };
                let stop = probe::execute(code!("mov eax, 23", "syscall", "ud2"), &registers);
                if stop.ended { Made::Answered(0) } else { Made::Trapped(stop.frame.vector) }
            }
        };
        (made, first)
    }

    /// Writes bytes where they can be written.
    fn lay(&self, at: u64, bytes: &[u8]) {
        let (ro, edge) = (self.read_only.address(), self.edge.address());
        if (ro..ro + PART * PAGE).contains(&at) {
            (0..PART).for_each(|i| self.read_only.set_writable(i, true).expect("a plain page"));
            probe::store_bytes(at, bytes);
            (0..PART).for_each(|i| self.read_only.set_writable(i, false).expect("a plain page"));
        } else if (edge..self.edge_end()).contains(&at) {
            let room = usize::try_from(self.edge_end() - at).unwrap_or(0).min(bytes.len());
            probe::store_bytes(at, &bytes[..room]);
        } else if (self.good.address()..self.good.address() + PARTS * PART * PAGE).contains(&at) {
            probe::store_bytes(at, bytes);
        }
    }

    /// Undoes what a call may have done.
    pub(crate) fn tidy(&self, target: &Target, first: u64) {
        let _ = events::mask_upcalls();
        match target.call {
            Hypercall::SetTrapTable | Hypercall::SetCallbacks | Hypercall::CallbackOp | Hypercall::NmiOp => {
                restore_handlers();
            }
            Hypercall::SetGdt => _ = call(target.call, [0; 5]),
            Hypercall::FpuTaskswitch => _ = call(target.call, [0; 5]),
            Hypercall::SetDebugreg => _ = call(target.call, [0; 5]),
            Hypercall::VmAssist => _ = call(target.call, [1, target.op, 0, 0, 0]),
            Hypercall::SetSegmentBase => _ = call(target.call, [target.op, 0, 0, 0, 0]),
            Hypercall::EventChannelOp => {
                for port in (1..64).filter(|port| !self.ports.contains(port)) {
                    let _ = hypercall::close(port);
                }
            }
            Hypercall::UpdateVaMapping | Hypercall::UpdateVaMappingOtherdomain => self.restore_pages(),
            Hypercall::GrantTableOp if target.op == GrantOp::MapGrantRef.number() => {
                let mut bytes = [0u8; 32];
                if first >= memory::VIRT_BASE && first + 32 <= self.edge_end() {
                    probe::load_bytes(first, &mut bytes);
                    self.unmap_grant(&bytes);
                }
                self.restore_pages();
            }
            Hypercall::GrantTableOp if target.op == GrantOp::UnmapGrantRef.number() => {
                self.unmap(self.window.address(), self.handle.replace(u32::MAX));
            }
            Hypercall::GrantTableOp if target.op == GrantOp::UnmapAndReplace.number() => {
                self.unmap(self.window.address(), self.handle.replace(u32::MAX));
                probe::update_va_mapping(self.window.address(), 0, 2).expect("a page can be unmapped");
                self.restore_pages();
            }
            Hypercall::MmuextOp => {
                for level in 1..=4 {
                    let _ = self.chain.unpin(level);
                }
                let _ = mmuext(MmuextCommand::SetLdt, 0, 0);
            }
            Hypercall::VcpuOp => {
                let none = [0u64];
                for (op, vcpu) in [(5, 0), (5, 1), (13, 0), (13, 1)] {
                    let _ = call(Hypercall::VcpuOp, [op, vcpu, address(&none), 0, 0]);
                }
                let _ = hypercall::stop_periodic_timer(0);
            }
            Hypercall::Domctl => {
                let spare = self.spare.replace(0);
                if spare != 0 {
                    let _ = control::destroy(spare);
                }
            }
            Hypercall::PhysdevOp => {
                let _ = guests::set_iopl(0);
                let _ = call(Hypercall::PhysdevOp, [7, address(&[0u64; 2]), 0, 0, 0]);
            }
            _ => {}
        }
    }

    /// Unmaps what a map request, as it came back, has mapped.
    fn unmap_grant(&self, request: &[u8; 32]) {
        let word = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().expect("eight bytes"));
        self.unmap(word(0), u32::try_from(word(16) >> 32).expect("32 bits"));
    }

    fn unmap(&self, host_addr: u64, handle: u32) {
        let request = [UnmapGrantRef { host_addr, handle, ..UnmapGrantRef::default() }];
        let op = GrantOp::UnmapGrantRef.number();
        let _ = call(Hypercall::GrantTableOp, [op, address(&request), 1, 0, 0]);
    }

    /// The handle of a grant that is mapped in the window.
    pub(crate) fn mapped(&self) -> u32 {
        let (flags, dom, host_addr) = (map::HOST, self.own, self.window.address());
        let request = [MapGrantRef { host_addr, flags, gref: GREF, dom, ..MapGrantRef::default() }];
        let op = GrantOp::MapGrantRef.number();
        call(Hypercall::GrantTableOp, [op, address(&request), 1, 0, 0]).expect("the ground can be granted");
        let mut answer = [0u8; 32];
        probe::load_bytes(address(&request), &mut answer);
        let handle = u32::from_le_bytes(answer[20..24].try_into().expect("four bytes"));
        self.handle.set(handle);
        handle
    }

    /// Lets the timer interrupt come soon.
    pub(crate) fn wake_soon(&self) {
        let _ = hypercall::set_timer(time::now_ns() + 1_000_000);
    }
}

/// How a call came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Made {
    /// With this in RAX.
    Answered(u64),
    /// With a trap.
    Trapped(u64),
}

impl Made {
    /// Whether it is as wanted; the first structure lay at `first`.
    pub(crate) fn is(self, answer: Answer, first: u64) -> bool {
        let Self::Answered(rax) = self else { return false };
        match answer {
            Answer::Refused(error) => rax == error.to_rax(),
            Answer::Done => rax.wrapping_neg() > 4095 || rax == 0,
            Answer::Value(value) => rax == value,
            Answer::Status(_, status) => rax == 0 && answer.status(first) == Some(status),
            Answer::Ends => false,
        }
    }
}

impl Answer {
    /// The status in the structure at `first`, if that is where the answer is.
    pub(crate) fn status(self, first: u64) -> Option<i16> {
        let Self::Status(at, _) = self else { return None };
        let mut bytes = [0; 2];
        probe::load_bytes(first + at, &mut bytes);
        Some(i16::from_le_bytes(bytes))
    }
}

/// Writes an argument.
fn put(shape: &mut Shape, place: Place, value: u64) {
    let (at, size) = match place {
        Place::Arg(n) => {
            shape.args[n] = value;
            return;
        }
        Place::U16(at) => (at, 2),
        Place::U32(at) => (at, 4),
        Place::U64(at) => (at, 8),
    };
    shape.parts[0].bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// The machine address of what lies at an address of ours; others stay as they are.
fn machine_address(at: u64) -> u64 {
    memory::frame_of(at).map_or(at, |frame| frame * PAGE + at % PAGE)
}

/// An empty domain of one vcpu.
fn make_domain() -> u16 {
    control::create(&[7; 16], 1).expect("a domain can be made")
}

/// A domain whose vcpu has a state: an empty root and nothing else.
fn make_child() -> u16 {
    let child = make_domain();
    control::set_max_memory(child, 64).expect("it is our domain");
    let mut frames = [0u64];
    assert_eq!(control::populate(child, 0, &mut frames), Ok(1));
    let mut context = Box::<VcpuContext>::default();
    context.flags = flags::IN_KERNEL;
    context.ctrlreg[3] = frames[0] * PAGE;
    control::set_vcpu(child, 0, &context).expect("a state is taken");
    child
}

fn is_open(port: u32) -> bool {
    hypercall::port_status(domid::SELF, port).is_ok_and(|status| status.status != 0)
}

/// The gates and callbacks the unikernel lives by.
fn restore_handlers() {
    let mut table: Vec<TrapInfo> = (0..=255).map(|vector| traps::gate(vector, 3, true)).collect();
    table.push(TrapInfo::default());
    call(Hypercall::SetTrapTable, [address(table.as_slice()), 0, 0, 0, 0]).expect("gates are taken");
    for (kind, stub) in [
        (CallbackType::Event, traps::EVENT),
        (CallbackType::Failsafe, traps::FAILSAFE),
        (CallbackType::Syscall, traps::SYSCALL),
    ] {
        let address = traps::handler_address(stub);
        let arg = CallbackRegister { kind: kind as u16, flags: CALLBACK_MASKS_EVENTS, pad: 0, address };
        let op = CallbackOp::Register.number();
        call(Hypercall::CallbackOp, [op, probe::address(&arg), 0, 0, 0]).expect("a callback is taken");
    }
}
