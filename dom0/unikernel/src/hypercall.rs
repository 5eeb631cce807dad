//! Typed hypercalls: one function per call, errors as [`Errno`] (convention: ABI core 1.7).
//!
//! Functions that can change the meaning of an address of this domain (by page tables or mapped grants) are `unsafe`.
//! The worst that the others can do is to return an error.

use core::arch::asm;
use core::cell::UnsafeCell;
use hypercall_abi::callback::{CallbackOp, CallbackRegister, CallbackType, SegmentBase, TrapInfo};
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::Domctl;
use hypercall_abi::event::{
    AllocUnbound, BindInterdomain, BindIpi, BindVcpu, BindVirq, EventOp, PortArg, Status, Virq,
};
use hypercall_abi::grant::{Copy, GrantOp, MapGrantRef, SetupTable, UnmapGrantRef};
use hypercall_abi::memory::{E820Entry, MachphysMapping, MemoryMap, MemoryOp, Reservation};
use hypercall_abi::mmu::{MmuUpdate, MmuextOp, MulticallEntry};
use hypercall_abi::physdev::{ConsoleIo, PhysdevOp, SetIopl};
use hypercall_abi::sched::{Poll, RemoteShutdown, SchedOp, Shutdown, ShutdownReason};
use hypercall_abi::sysctl::{PhysInfo, ReadConsole, Sysctl, SysctlOp};
use hypercall_abi::tenon::TenonOp;
use hypercall_abi::vcpu::{RegisterArea, RunstateInfo, SetPeriodicTimer, SetSingleshotTimer, VcpuOp};
use hypercall_abi::version::{FeatureInfo, VersionOp};
use hypercall_abi::{Errno, Hypercall, domid};
use zerocopy::{FromBytes, IntoBytes};

/// Makes a hypercall with these registers; returns `rax` unchanged.
///
/// # Safety
/// The caller is responsible for what the call does to this domain's memory, and every address among the arguments must
/// be one that the call may read or write.
#[must_use]
pub unsafe fn raw(number: u64, args: [u64; 5]) -> u64 {
    let [a, b, c, d, e] = args;
    let result;
    // SAFETY: `syscall` in a guest kernel is a hypercall; it destroys rcx and r11, and may destroy its arguments
    // (ABI core 1.7). The caller is responsible for the effect of the call.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            inlateout("r10") d => _,
            inlateout("r8") e => _,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// Makes a hypercall, and turns an error in `rax` into an [`Errno`].
///
/// # Safety
/// As [`raw`].
unsafe fn call(which: Hypercall, args: [u64; 5]) -> Result<u64, Errno> {
    // SAFETY: the caller's promise, passed on.
    Errno::from_rax(unsafe { raw(which.number(), args) })
}

/// An object's address as a register.
fn address<T: ?Sized>(object: *const T) -> u64 {
    object.cast::<u8>().addr() as u64
}

// --- Version, console ---------------------------------------------------------------------------------------------

/// `xen_version(0)`: major << 16 | minor. It is also the cheapest call; pending events are delivered when it returns.
pub fn version() -> u64 {
    // SAFETY: reads nothing, writes nothing.
    unsafe { raw(Hypercall::XenVersion.number(), [VersionOp::Version.number(), 0, 0, 0, 0]) }
}

/// `xen_version(1)`: the version text after the two numbers of [`version`], for instance `.0-tenon`.
///
/// # Errors
/// Our hypervisor returns no error.
pub fn extraversion() -> Result<[u8; 16], Errno> {
    let mut text = [0; 16];
    // SAFETY: writes only the 16 bytes given.
    unsafe { call(Hypercall::XenVersion, [VersionOp::Extraversion.number(), address(&raw mut text), 0, 0, 0]) }?;
    Ok(text)
}

/// `xen_version(6)`: the feature bits of word `submap`.
///
/// # Errors
/// `Inval` for a word that does not exist.
pub fn features(submap: u32) -> Result<u32, Errno> {
    let mut info = FeatureInfo { submap_idx: submap, submap: 0 };
    let arg = address(&raw mut info);
    // SAFETY: writes only the structure given.
    unsafe { call(Hypercall::XenVersion, [VersionOp::GetFeatures.number(), arg, 0, 0, 0]) }?;
    Ok(info.submap)
}

/// `console_io(0)`: prints bytes on the hypervisor's console; returns how many the hypervisor took.
///
/// # Errors
/// `Perm` or `NoSys` where the hypervisor does not let this domain print.
pub fn console_write(bytes: &[u8]) -> Result<u64, Errno> {
    let args = [ConsoleIo::Write.number(), bytes.len() as u64, address(bytes), 0, 0];
    // SAFETY: reads only the slice.
    unsafe { call(Hypercall::ConsoleIo, args) }
}

/// `console_io(1)`: reads what was typed on the machine's console; returns the number of bytes.
///
/// # Errors
/// `Perm` for a domain without authority over the console.
pub fn console_read(buffer: &mut [u8]) -> Result<usize, Errno> {
    let room = buffer.len();
    let args = [ConsoleIo::Read.number(), room as u64, address(buffer.as_mut_ptr()), 0, 0];
    // SAFETY: writes only the slice.
    let count = unsafe { call(Hypercall::ConsoleIo, args) }?;
    Ok(usize::try_from(count).unwrap_or(room).min(room))
}

/// `physdev_op(set_iopl)`: the privilege from which on this vcpu may use ports; 1 is the guest kernel's.
///
/// # Errors
/// `Inval` above 3.
pub fn set_iopl(level: u32) -> Result<(), Errno> {
    let arg = SetIopl { iopl: level };
    // SAFETY: reads only the structure.
    unsafe { call(Hypercall::PhysdevOp, [PhysdevOp::SetIopl.number(), address(&raw const arg), 0, 0, 0]) }.map(drop)
}

// --- Scheduling ---------------------------------------------------------------------------------------------------

/// `sched_op(yield)`: lets another vcpu run.
pub fn yield_now() {
    // SAFETY: no memory is involved.
    let _ = unsafe { call(Hypercall::SchedOp, [SchedOp::Yield.number(), 0, 0, 0, 0]) };
}

/// `sched_op(block)`: unmasks upcalls and sleeps until an upcall was delivered.
pub fn block() {
    // SAFETY: no memory is involved.
    let _ = unsafe { call(Hypercall::SchedOp, [SchedOp::Block.number(), 0, 0, 0, 0]) };
}

/// Sleeps until an event is pending, and leaves the upcall mask as it is (our own extension).
///
/// # Errors
/// `NoSys` on a hypervisor without the extension.
pub fn wait() -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    unsafe { call(Hypercall::Tenon, [TenonOp::Wait.number(), 0, 0, 0, 0]) }.map(drop)
}

/// `sched_op(poll)`: sleeps until one of `ports` is pending, an event is due, or `timeout_ns` (absolute, 0 = none).
///
/// # Errors
/// `Inval` for too many ports or for a port that is not bound.
pub fn poll(ports: &[u32], timeout_ns: u64) -> Result<(), Errno> {
    let poll = Poll {
        ports: address(ports),
        nr_ports: u32::try_from(ports.len()).unwrap_or(u32::MAX),
        pad: 0,
        timeout: timeout_ns,
    };
    let args = [SchedOp::Poll.number(), address(&raw const poll), 0, 0, 0];
    // SAFETY: reads only the structure and the slice.
    unsafe { call(Hypercall::SchedOp, args) }.map(drop)
}

/// `sched_op(shutdown)`: ends the domain.
pub fn shutdown(reason: ShutdownReason) -> ! {
    let arg = Shutdown { reason: reason as u32 };
    let args = [SchedOp::Shutdown.number(), address(&raw const arg), 0, 0, 0];
    loop {
        // SAFETY: reads only the structure; it returns only from a suspend, which we do not support.
        let _ = unsafe { call(Hypercall::SchedOp, args) };
    }
}

// --- Traps and callbacks ------------------------------------------------------------------------------------------

/// `set_trap_table`: replaces the gates listed, up to the first whose address is 0.
///
/// # Safety
/// Each address is a handler that follows the frame convention (ABI core 3.3).
///
/// # Errors
/// `Inval` for an address that is not canonical.
pub unsafe fn set_trap_table(gates: &[TrapInfo]) -> Result<(), Errno> {
    debug_assert!(gates.last().is_some_and(|gate| gate.address == 0));
    // SAFETY: reads only the slice, which ends in a terminator; the handlers are the caller's promise.
    unsafe { call(Hypercall::SetTrapTable, [address(gates), 0, 0, 0, 0]) }.map(drop)
}

/// `callback_op(register)`: sets the handler of a callback.
///
/// # Safety
/// `handler` follows the frame convention of its kind (ABI core 3.4).
///
/// # Errors
/// `Inval` for an address that is not canonical, `NoSys` for an unknown kind.
pub unsafe fn register_callback(kind: CallbackType, flags: u16, handler: u64) -> Result<(), Errno> {
    let arg = CallbackRegister { kind: kind as u16, flags, pad: 0, address: handler };
    let args = [CallbackOp::Register.number(), address(&raw const arg), 0, 0, 0];
    // SAFETY: reads only the structure; the handler is the caller's promise.
    unsafe { call(Hypercall::CallbackOp, args) }.map(drop)
}

/// `stack_switch`: sets the stack on which the next entry from user mode pushes its frame.
///
/// # Safety
/// `sp` is the end of a stack that is free whenever user code runs.
///
/// # Errors
/// The ABI documents no error.
pub unsafe fn stack_switch(ss: u16, sp: u64) -> Result<(), Errno> {
    // SAFETY: no memory is read or written now; the stack is the caller's promise.
    unsafe { call(Hypercall::StackSwitch, [u64::from(ss), sp, 0, 0, 0]) }.map(drop)
}

/// `set_segment_base`: sets the base of FS or GS.
///
/// # Errors
/// `Inval` for a base that is not canonical.
pub fn set_segment_base(which: SegmentBase, base: u64) -> Result<(), Errno> {
    // SAFETY: no code of ours addresses memory through FS or GS.
    unsafe { call(Hypercall::SetSegmentBase, [which.number(), base, 0, 0, 0]) }.map(drop)
}

// --- Page tables --------------------------------------------------------------------------------------------------

/// `update_va_mapping`: writes the L1 entry that maps `va`.
///
/// # Safety
/// No memory that Rust still uses may lose its mapping, or get a second one.
///
/// # Errors
/// `Inval` if no L1 table covers `va`; otherwise why the entry was refused.
pub unsafe fn update_va_mapping(va: u64, entry: u64, flags: u64) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { call(Hypercall::UpdateVaMapping, [va, entry, flags, 0, 0]) }.map(drop)
}

/// `mmu_update` of our page tables, with frames of `owner`; returns how many updates were done.
///
/// # Safety
/// As [`update_va_mapping`].
///
/// # Errors
/// Why an update was refused; the updates before it were done.
pub unsafe fn mmu_update(updates: &[MmuUpdate], owner: u16) -> Result<u32, Errno> {
    let mut done = 0u32;
    let args = [address(updates), updates.len() as u64, address(&raw mut done), u64::from(owner), 0];
    // SAFETY: reads the slice, writes `done`; the effect is the caller's promise.
    unsafe { call(Hypercall::MmuUpdate, args) }?;
    Ok(done)
}

/// `mmuext_op` on `domain`; returns how many operations were done.
///
/// # Safety
/// As [`update_va_mapping`].
///
/// # Errors
/// Why an operation was refused; the operations before it were done.
pub unsafe fn mmuext_op(ops: &[MmuextOp], domain: u16) -> Result<u32, Errno> {
    let mut done = 0u32;
    let args = [address(ops), ops.len() as u64, address(&raw mut done), u64::from(domain), 0];
    // SAFETY: reads the slice, writes `done`; the effect is the caller's promise.
    unsafe { call(Hypercall::MmuextOp, args) }?;
    Ok(done)
}

/// `multicall`: makes several calls; each entry holds the result of its call afterwards.
///
/// # Safety
/// As each call in the list.
///
/// # Errors
/// `Fault` or `Inval` for the list as a whole.
pub unsafe fn multicall(entries: &mut [MulticallEntry]) -> Result<(), Errno> {
    let args = [address(entries.as_mut_ptr()), entries.len() as u64, 0, 0, 0];
    // SAFETY: reads and writes the slice; the calls in it are the caller's promise.
    unsafe { call(Hypercall::Multicall, args) }.map(drop)
}

/// `memory_op(machphys_mapping)`: where the hypervisor's M2P table is.
///
/// # Errors
/// The ABI documents no error for a PV guest.
pub fn machphys_mapping() -> Result<MachphysMapping, Errno> {
    let mut map = MachphysMapping::default();
    let args = [MemoryOp::MachphysMapping.number(), address(&raw mut map), 0, 0, 0];
    // SAFETY: writes only the structure.
    unsafe { call(Hypercall::MemoryOp, args) }?;
    Ok(map)
}

/// `memory_op(memory_map)`: fills `entries`; returns how many it filled.
///
/// # Errors
/// `NoSys` where the hypervisor has no map for the caller.
pub fn memory_map(entries: &mut [E820Entry]) -> Result<u32, Errno> {
    let mut map = MemoryMap {
        nr_entries: u32::try_from(entries.len()).unwrap_or(u32::MAX),
        pad: 0,
        buffer: address(entries.as_mut_ptr()),
    };
    let args = [MemoryOp::MemoryMap.number(), address(&raw mut map), 0, 0, 0];
    // SAFETY: writes only the structure and at most as many entries as it names.
    unsafe { call(Hypercall::MemoryOp, args) }?;
    Ok(map.nr_entries)
}

/// `memory_op` on a reservation: populate, increase or decrease. Returns the number of extents done.
///
/// # Safety
/// The command may take the pages or frames in `extents`: a frame that is given back must not be in use.
///
/// # Errors
/// Why the command as a whole was refused. An extent that fails is no error, it only ends the count.
pub unsafe fn reservation(command: MemoryOp, extents: &mut [u64], domain: u16) -> Result<u64, Errno> {
    // SAFETY: the caller's promise, passed on.
    unsafe { reservation_of_order(command, extents, 0, domain) }
}

/// Like [`reservation`], but for extents of `2^order` pages or frames each.
///
/// # Safety
/// As [`reservation`].
///
/// # Errors
/// As [`reservation`].
pub unsafe fn reservation_of_order(
    command: MemoryOp,
    extents: &mut [u64],
    extent_order: u32,
    domain: u16,
) -> Result<u64, Errno> {
    let arg = Reservation {
        extent_start: address(extents.as_mut_ptr()),
        nr_extents: extents.len() as u64,
        extent_order,
        mem_flags: 0,
        domid: domain,
        pad: [0; 3],
    };
    let args = [command.number(), address(&raw const arg), 0, 0, 0];
    // SAFETY: reads the structure, reads and writes the slice; which frames is the caller's promise.
    unsafe { call(Hypercall::MemoryOp, args) }
}

/// `vm_assist(enable)`: enables an assist.
///
/// # Errors
/// `Inval` for a type the hypervisor does not know.
pub fn assist(kind: hypercall_abi::callback::Assist) -> Result<(), Errno> {
    let enable = u64::from(hypercall_abi::callback::ASSIST_ENABLE);
    // SAFETY: every assist only makes more instructions succeed.
    unsafe { call(Hypercall::VmAssist, [enable, kind.number(), 0, 0, 0]) }.map(drop)
}

// --- Events -------------------------------------------------------------------------------------------------------

/// `event_channel_op` with its structure, which the call may write.
fn event_op<T>(command: EventOp, arg: &mut T) -> Result<(), Errno> {
    let args = [command.number(), address(&raw mut *arg), 0, 0, 0];
    // SAFETY: reads and writes only the structure, whose type belongs to the command (all callers are below).
    unsafe { call(Hypercall::EventChannelOp, args) }.map(drop)
}

/// Allocates a port of domain `dom` (usually [`domid::SELF`]) that `remote` may bind.
///
/// # Errors
/// `Srch`, `Perm`, `NoSpc` (ABI core 5.2).
pub fn allocate_unbound(dom: u16, remote: u16) -> Result<u32, Errno> {
    let mut arg = AllocUnbound { dom, remote_dom: remote, port: 0 };
    event_op(EventOp::AllocUnbound, &mut arg)?;
    Ok(arg.port)
}

/// Binds a new port to the unbound port `remote_port` of `remote`; returns the new port.
///
/// # Errors
/// `Srch`, `Inval`, `NoSpc` (ABI core 5.2).
pub fn bind_interdomain(remote: u16, remote_port: u32) -> Result<u32, Errno> {
    let mut arg = BindInterdomain { remote_dom: remote, pad: 0, remote_port, local_port: 0 };
    event_op(EventOp::BindInterdomain, &mut arg)?;
    Ok(arg.local_port)
}

/// Binds a virtual interrupt to `vcpu`; returns the port.
///
/// # Errors
/// `Inval`, `NoEnt`, `Exist`, `Busy` (ABI core 5.2).
pub fn bind_virq(virq: Virq, vcpu: u32) -> Result<u32, Errno> {
    let mut arg = BindVirq { virq: virq as u32, vcpu, port: 0 };
    event_op(EventOp::BindVirq, &mut arg)?;
    Ok(arg.port)
}

/// Allocates a port that interrupts `vcpu` of this domain.
///
/// # Errors
/// `NoEnt` for a vcpu that does not exist.
pub fn bind_ipi(vcpu: u32) -> Result<u32, Errno> {
    let mut arg = BindIpi { vcpu, port: 0 };
    event_op(EventOp::BindIpi, &mut arg)?;
    Ok(arg.port)
}

/// Moves a port to another vcpu.
///
/// # Errors
/// `Inval` for ports that belong to one vcpu, `NoEnt` for a vcpu that does not exist.
pub fn bind_vcpu(port: u32, vcpu: u32) -> Result<(), Errno> {
    event_op(EventOp::BindVcpu, &mut BindVcpu { port, vcpu })
}

/// Closes a port.
///
/// # Errors
/// `Inval` for a port that is not in use.
pub fn close(port: u32) -> Result<(), Errno> {
    event_op(EventOp::Close, &mut PortArg { port })
}

/// Sends an event to the other end of a port.
///
/// # Errors
/// `Inval` for a port that cannot be sent on.
pub fn send(port: u32) -> Result<(), Errno> {
    event_op(EventOp::Send, &mut PortArg { port })
}

/// `EVTCHNOP_unmask`: clears the mask bit, and makes the upcall pending if the port was pending.
///
/// # Errors
/// `Inval` for a port out of range.
pub fn unmask(port: u32) -> Result<(), Errno> {
    event_op(EventOp::Unmask, &mut PortArg { port })
}

/// The state of `port` of `dom`.
///
/// # Errors
/// `Srch`, `Inval` (ABI core 5.2).
pub fn port_status(dom: u16, port: u32) -> Result<Status, Errno> {
    let mut arg = Status { dom, port, ..Status::default() };
    event_op(EventOp::Status, &mut arg)?;
    Ok(arg)
}

// --- Vcpus and time -----------------------------------------------------------------------------------------------

/// `vcpu_op` without an argument.
///
/// # Safety
/// The command takes no argument.
unsafe fn plain_vcpu_op(command: VcpuOp, vcpu: u32) -> Result<u64, Errno> {
    let args = [command.number(), u64::from(vcpu), 0, 0, 0];
    // SAFETY: the command takes no argument, by this function's contract.
    unsafe { call(Hypercall::VcpuOp, args) }
}

/// `vcpu_op` with a structure.
///
/// # Safety
/// `T` is the command's structure.
unsafe fn vcpu_op<T>(command: VcpuOp, vcpu: u32, arg: *mut T) -> Result<u64, Errno> {
    let args = [command.number(), u64::from(vcpu), address(arg), 0, 0];
    // SAFETY: reads or writes only the structure, by this function's contract.
    unsafe { call(Hypercall::VcpuOp, args) }
}

/// Returns 1 if `vcpu` is online, 0 if not.
///
/// # Errors
/// `NoEnt` for a vcpu that does not exist.
pub fn vcpu_is_up(vcpu: u32) -> Result<u64, Errno> {
    // SAFETY: `is_up` takes no argument.
    unsafe { plain_vcpu_op(VcpuOp::IsUp, vcpu) }
}

/// Sets the initial state of a vcpu.
///
/// # Safety
/// With this state the vcpu runs only code that is sound beside ours.
///
/// # Errors
/// `Exist` if the vcpu has a state already, `Inval` for a bad state.
pub unsafe fn vcpu_initialise(vcpu: u32, context: &mut VcpuContext) -> Result<(), Errno> {
    // SAFETY: the structure is the command's; its content is the caller's promise.
    unsafe { vcpu_op(VcpuOp::Initialise, vcpu, &raw mut *context) }.map(drop)
}

/// Brings a vcpu online.
///
/// # Errors
/// `Inval` if it was never initialised.
pub fn vcpu_up(vcpu: u32) -> Result<(), Errno> {
    // SAFETY: `up` takes no argument.
    unsafe { plain_vcpu_op(VcpuOp::Up, vcpu) }.map(drop)
}

/// Takes a vcpu offline; the last one ends the domain.
///
/// # Errors
/// `NoEnt` for a vcpu that does not exist.
pub fn vcpu_down(vcpu: u32) -> Result<(), Errno> {
    // SAFETY: `down` takes no argument.
    unsafe { plain_vcpu_op(VcpuOp::Down, vcpu) }.map(drop)
}

/// Sends a non-maskable interrupt to a vcpu.
///
/// # Errors
/// `NoEnt` for a vcpu that does not exist.
pub fn send_nmi(vcpu: u32) -> Result<(), Errno> {
    // SAFETY: `send_nmi` takes no argument.
    unsafe { plain_vcpu_op(VcpuOp::SendNmi, vcpu) }.map(drop)
}

/// How much time a vcpu has spent in each runstate.
///
/// # Errors
/// `NoEnt` for a vcpu that does not exist.
pub fn runstate(vcpu: u32) -> Result<RunstateInfo, Errno> {
    let mut info = RunstateInfo::default();
    // SAFETY: the structure is the command's.
    unsafe { vcpu_op(VcpuOp::GetRunstateInfo, vcpu, &raw mut info) }?;
    Ok(info)
}

/// Memory in which the hypervisor keeps a vcpu's runstate up to date (ABI core 6.4).
#[repr(transparent)]
pub struct RunstateArea(UnsafeCell<RunstateInfo>);

// SAFETY: the hypervisor writes it; we only read copies, through volatile accesses.
unsafe impl Sync for RunstateArea {}

impl RunstateArea {
    /// An area that is not registered yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(UnsafeCell::new(RunstateInfo { state: 0, pad: 0, state_entry_time: 0, time: [0; 4] }))
    }

    /// The runstate as it is now.
    #[must_use]
    pub fn read(&self) -> RunstateInfo {
        // SAFETY: aligned and valid; the other writer is the hypervisor, hence volatile.
        unsafe { self.0.get().read_volatile() }
    }
}

impl Default for RunstateArea {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes the hypervisor keep a vcpu's runstate at `area`.
///
/// # Errors
/// `NoEnt` for a vcpu that does not exist, `Fault` for a bad address.
pub fn register_runstate(vcpu: u32, area: &'static RunstateArea) -> Result<(), Errno> {
    let mut arg = RegisterArea { address: address(area.0.get()) };
    // SAFETY: the structure is the command's; the area is never moved and only read through volatile accesses.
    unsafe { vcpu_op(VcpuOp::RegisterRunstateMemoryArea, vcpu, &raw mut arg) }.map(drop)
}

/// Starts a vcpu's periodic timer, with a period of `period_ns`.
///
/// # Errors
/// `Inval` for less than a millisecond.
pub fn set_periodic_timer(vcpu: u32, period_ns: u64) -> Result<(), Errno> {
    let mut arg = SetPeriodicTimer { period_ns };
    // SAFETY: the structure is the command's.
    unsafe { vcpu_op(VcpuOp::SetPeriodicTimer, vcpu, &raw mut arg) }.map(drop)
}

/// Stops a vcpu's periodic timer.
///
/// # Errors
/// The ABI documents no error; the call must succeed (ABI core 6.3).
pub fn stop_periodic_timer(vcpu: u32) -> Result<(), Errno> {
    // SAFETY: takes no argument.
    unsafe { plain_vcpu_op(VcpuOp::StopPeriodicTimer, vcpu) }.map(drop)
}

/// Sets the one-shot timer of the calling vcpu to `deadline_ns` (system time); a past deadline fires at once.
///
/// # Errors
/// `Inval` for another vcpu.
pub fn set_singleshot_timer(vcpu: u32, deadline_ns: u64) -> Result<(), Errno> {
    let mut arg = SetSingleshotTimer { timeout_abs_ns: deadline_ns, flags: 0, pad: 0 };
    // SAFETY: the structure is the command's.
    unsafe { vcpu_op(VcpuOp::SetSingleshotTimer, vcpu, &raw mut arg) }.map(drop)
}

/// Cancels the one-shot timer.
///
/// # Errors
/// `Inval` for another vcpu.
pub fn stop_singleshot_timer(vcpu: u32) -> Result<(), Errno> {
    // SAFETY: takes no argument.
    unsafe { plain_vcpu_op(VcpuOp::StopSingleshotTimer, vcpu) }.map(drop)
}

/// `set_timer_op`: like [`set_singleshot_timer`] for the calling vcpu, by another call; 0 cancels the timer.
///
/// # Errors
/// The ABI documents no error.
pub fn set_timer(deadline_ns: u64) -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    unsafe { call(Hypercall::SetTimerOp, [deadline_ns, 0, 0, 0, 0]) }.map(drop)
}

// --- Grants -------------------------------------------------------------------------------------------------------

/// `grant_table_op` on an array.
///
/// # Safety
/// `T` is the command's structure; the caller is responsible for the effect on our mappings.
unsafe fn grant_op<T>(command: GrantOp, array: &mut [T]) -> Result<(), Errno> {
    let args = [command.number(), address(array.as_mut_ptr()), array.len() as u64, 0, 0];
    // SAFETY: the caller's promise.
    unsafe { call(Hypercall::GrantTableOp, args) }.map(drop)
}

/// Maps grants; each element has its own status.
///
/// # Safety
/// As [`update_va_mapping`] for each `host_addr`.
///
/// # Errors
/// Of the call as a whole: `Fault`, `Inval`, `NoSys`.
pub unsafe fn map_grants(grants: &mut [MapGrantRef]) -> Result<(), Errno> {
    // SAFETY: the structure is the command's; the mappings are the caller's promise.
    unsafe { grant_op(GrantOp::MapGrantRef, grants) }
}

/// Unmaps grants; each element has its own status.
///
/// # Safety
/// Nothing uses the mappings any more.
///
/// # Errors
/// Of the call as a whole: `Fault`, `Inval`, `NoSys`.
pub unsafe fn unmap_grants(grants: &mut [UnmapGrantRef]) -> Result<(), Errno> {
    // SAFETY: the structure is the command's; the mappings are the caller's promise.
    unsafe { grant_op(GrantOp::UnmapGrantRef, grants) }
}

/// Copies between pages; each element has its own status.
///
/// # Safety
/// If a destination is a frame of ours, no Rust reference leads to the bytes.
///
/// # Errors
/// Of the call as a whole: `Fault`, `Inval`, `NoSys`.
pub unsafe fn copy_grants(copies: &mut [Copy]) -> Result<(), Errno> {
    // SAFETY: the structure is the command's; the destinations are the caller's promise.
    unsafe { grant_op(GrantOp::Copy, copies) }
}

/// `grant_table_op(setup_table)`: gets the frames of grant tables; each element has its own status.
///
/// # Safety
/// Each `frame_list` is the address of as many words as the element has frames.
///
/// # Errors
/// Of the call as a whole: `Fault`, `Inval`, `NoSys`.
pub unsafe fn setup_grant_tables(tables: &mut [SetupTable]) -> Result<(), Errno> {
    // SAFETY: the structure is the command's; the lists are the caller's promise.
    unsafe { grant_op(GrantOp::SetupTable, tables) }
}

/// Gets the frames of this domain's grant table, and grows it to at least `frames.len()` frames.
///
/// # Errors
/// `Inval` if the table cannot have that many.
pub fn setup_grant_table(frames: &mut [u64]) -> Result<(), Errno> {
    let mut arg = [SetupTable {
        dom: domid::SELF,
        nr_frames: u32::try_from(frames.len()).map_err(|_| Errno::Inval)?,
        frame_list: address(frames.as_mut_ptr()),
        ..SetupTable::default()
    }];
    // SAFETY: the structure is the command's; it writes one word per frame asked for.
    unsafe { grant_op(GrantOp::SetupTable, &mut arg) }?;
    if arg[0].status == 0 { Ok(()) } else { Err(Errno::Inval) }
}

// --- The toolstack ------------------------------------------------------------------------------------------------

/// `domctl`: see [`hypercall_abi::domctl`].
///
/// # Safety
/// Each address inside the payload is one that the command may read or write.
///
/// # Errors
/// `Perm` without authority; otherwise the error of the command.
pub unsafe fn domctl(arg: &mut Domctl) -> Result<u64, Errno> {
    // SAFETY: reads and writes the structure; addresses in it are the caller's promise.
    unsafe { call(Hypercall::Domctl, [address(&raw mut *arg), 0, 0, 0, 0]) }
}

/// `sysctl(PhysInfo)`: memory and CPUs of the machine.
///
/// # Errors
/// `Perm` without authority.
pub fn physical_info() -> Result<PhysInfo, Errno> {
    let mut arg = Sysctl {
        cmd: SysctlOp::PhysInfo as u32,
        interface_version: hypercall_abi::sysctl::INTERFACE_VERSION,
        payload: [0; 128],
    };
    // SAFETY: reads and writes the structure; its payload holds no address.
    unsafe { call(Hypercall::Sysctl, [address(&raw mut arg), 0, 0, 0, 0]) }?;
    PhysInfo::read_from_prefix(&arg.payload).map(|(info, _)| info).map_err(|_| Errno::Inval)
}

/// `sysctl(ReadConsole)`: reads the hypervisor's log from position `from` on. Returns how many bytes it read, and the
/// position to continue at. With `clear`, the log before `from` is cleared.
///
/// # Errors
/// `Perm` without authority.
pub fn read_log(from: u32, clear: bool, to: &mut [u8]) -> Result<(usize, u32), Errno> {
    let wanted = ReadConsole {
        clear: u8::from(clear),
        incremental: 1,
        index: from,
        buffer: address(to.as_mut_ptr()),
        count: u32::try_from(to.len()).unwrap_or(u32::MAX),
        ..ReadConsole::default()
    };
    let mut arg = Sysctl {
        cmd: SysctlOp::ReadConsole as u32,
        interface_version: hypercall_abi::sysctl::INTERFACE_VERSION,
        payload: [0; 128],
    };
    let (payload, _) = arg.payload.split_at_mut(size_of::<ReadConsole>());
    payload.copy_from_slice(wanted.as_bytes());
    // SAFETY: reads and writes the structure, and the slice, whose address and length its payload holds.
    unsafe { call(Hypercall::Sysctl, [address(&raw mut arg), 0, 0, 0, 0]) }?;
    let (told, _) = ReadConsole::read_from_prefix(&arg.payload).map_err(|_| Errno::Inval)?;
    Ok((usize::try_from(told.count).unwrap_or(0).min(to.len()), told.index))
}

/// `sched_op(remote_shutdown)` of this domain: ends it for a reason that need not be one of [`ShutdownReason`]. Only a
/// domain with authority over others may do this.
pub fn shutdown_with(reason: u32) -> ! {
    let arg = RemoteShutdown { domain: domid::SELF, pad: 0, reason };
    loop {
        // SAFETY: reads only the structure.
        let _ =
            unsafe { call(Hypercall::SchedOp, [SchedOp::RemoteShutdown.number(), address(&raw const arg), 0, 0, 0]) };
        yield_now();
    }
}

/// Joins a free port of ours, notifying `vcpu`, to a message that a device can send (our own extension).
///
/// # Errors
/// `Perm` for a domain without devices, `Inval` for a vcpu that does not exist, `NoSpc` without a free port or vector.
pub fn bind_message(vcpu: u32) -> Result<hypercall_abi::tenon::BindMessage, Errno> {
    let mut message = hypercall_abi::tenon::BindMessage { vcpu, ..Default::default() };
    let op = hypercall_abi::tenon::TenonOp::BindMessage.number();
    // SAFETY: reads and writes only the structure.
    unsafe { call(Hypercall::Tenon, [op, u64::from(domid::SELF), address(&raw mut message), 0, 0]) }?;
    Ok(message)
}

/// The last requests of `domain` that the hypervisor refused (our own extension).
///
/// # Errors
/// `NoSys` on a hypervisor without the extension, `Srch`, `Perm`.
pub fn refusals(domain: u16) -> Result<hypercall_abi::tenon::Refusals, Errno> {
    let mut refusals = hypercall_abi::tenon::Refusals::default();
    let args = [TenonOp::Refusals.number(), u64::from(domain), address(&raw mut refusals), 0, 0];
    // SAFETY: writes only the structure.
    unsafe { call(Hypercall::Tenon, args) }?;
    Ok(refusals)
}

/// The text of the crash of `domain`, if it crashed (our own extension).
///
/// # Errors
/// `NoSys` on a hypervisor without the extension, `Srch`, `Perm`.
pub fn crash_report(domain: u16) -> Result<hypercall_abi::tenon::CrashReport, Errno> {
    let mut report = hypercall_abi::tenon::CrashReport::default();
    let args = [TenonOp::CrashReport.number(), u64::from(domain), address(&raw mut report), 0, 0];
    // SAFETY: writes only the structure.
    unsafe { call(Hypercall::Tenon, args) }?;
    Ok(report)
}
