//! Faults that `tests/sim` plants into these rules to show that its audit would catch them, a count of work that it could
//! not see otherwise, and the places where another of its CPUs may come between. Without the feature `planted-fault`, which
//! no image has, none of this exists: `planted` is the constant `false`, nothing is counted, and nobody comes between.

/// A rule to leave out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Fault {
    /// A replaced entry keeps its use of the frame.
    SkipUseDrop = 1,
    /// A writable leaf is counted like a read-only one.
    SkipWritableCheck,
    /// Frames change type and owner without a flush.
    SkipFlush,
    /// Unfinished work is not finished first, and unfinished tables are used like others.
    IgnoreUnfinished,
    /// Anybody's frame will do.
    SkipOwnerCheck,
    /// A promotion that fails does not return what it took.
    SkipUnwind,
    /// A change of the write bit counts as harmless.
    WideFastPath,
    /// A pinned table can be pinned again.
    PinTwice,
    /// A root keeps the guest's entries in the hypervisor's slots.
    SkipHoleFill,
    /// A frame given back goes to the pool though others map it.
    FreeEarly,
    /// Frames reach a new owner with the old contents.
    SkipScrub,
    /// Destroying a domain keeps what its page tables hold of others.
    KeepForeign,
    /// Destroying a domain forgets what others hold of its frames.
    ForgetOthers,
    /// The frames of a GDT are taken only as far as the budget of a step goes, and then given back.
    StartOver,
    /// No interrupt is let in between two steps of a call.
    DeafCalls,
    /// A frame that is given back counts no more, though somebody uses it.
    CountEarly,
    /// Domains get memory that is set aside.
    BreakPromises,
    /// A vcpu without breakpoints finds the addresses of whoever was on the CPU before.
    KeepBreakpoints,
    /// The end of a frame's last use is not stamped.
    SkipStamp,
    /// An entry that is written into a table is not noted among those that are to be taken down: by an update,
    SkipNoteOfUpdate,
    /// by a table on its way up, which has them already,
    SkipNoteOfClimb,
    /// by the fast path of an update,
    SkipNoteOfFastUpdate,
    /// by the fast path up.
    SkipNoteOfFastClimb,
    /// The end of a frame's last use is stamped after the count says so.
    StampLate,
    /// A fast path drops a leaf's use as writable before the entry says so.
    DropEarly,
    /// Fast paths take anybody's frame for the domain's own.
    FastWithoutOwner,
    /// A page that was found is remembered over a flush.
    SeenOverFlush,
    /// It is remembered though the root leads elsewhere.
    SeenOverRoot,
    /// It is remembered though its leaf has changed.
    SeenOverLeaf,
    /// It is remembered when a vcpu of another domain comes.
    SeenByOthers,
    /// A CPU whose vcpu sleeps is not asked for its domain's flushes, and does not forget what it has found.
    LeaveEarly,
    /// The entry code acts by itself though handlers do not mask events.
    ArmAnyway,
    /// A fast path back to the kernel does not look for events that wait.
    FastOverEvents,
    /// The entry code keeps what it knew though a flush was answered or the kernel's stack was moved.
    StayArmed,
    /// Fast paths make a read-only leaf writable without a use.
    FastWithoutUse,
    /// A vcpu that may run again while it is put off stays off.
    LeaveOff,
    /// A vcpu comes to a CPU, and the timer there is not set for its deadlines.
    ArriveUnkept,
    /// Two CPUs that wake a vcpu at once both have it wait.
    QueueTwice,
    /// What vcpus run out of turn is charged to nobody.
    BoostForFree,
    /// A CPU has a vcpu wait that it has let go of, though another has it already.
    RunTwice,
    /// A vcpu that goes to sleep looks for events before, and not afterwards: a kick that comes late finds it gone.
    SleepBlindly,
    /// The same for one that waits for any event.
    WaitBlindly,
    /// A vector still leads to a port that was closed.
    KeepVector,
    /// A flush counts from its end, not from its beginning.
    LateTicket,
    /// A frame found before a flush is written after it.
    KeepFrame,
    /// Two CPUs destroy a domain at once.
    UnmakeTogether,
    /// A domain is unmade though another CPU's call has found it alive.
    UnmakeVisited,
    /// A domain's limit is compared first, and what it gets is counted later.
    CountApart,
    /// A machine does not wait until other CPUs have flushed.
    AwaitNoFlush,
    /// A machine answers that it has flushed when its entry code has been told already what it may do.
    ArmThenAnswer,
    /// A domain begins with what the last one in its slot has left in a field.
    InheritField,
}

/// Whether this field is to be left as it was when a domain begins.
pub(crate) fn forgets(field: &str) -> bool {
    planted(Fault::InheritField) && field == INHERITED
}

/// The field that [`Fault::InheritField`] is about.
pub const INHERITED: &str = "pollers";

#[cfg(feature = "planted-fault")]
static PLANTED: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);

/// Plants a fault in this process, or removes it.
#[cfg(feature = "planted-fault")]
pub fn plant(fault: Option<Fault>) {
    PLANTED.store(fault.map_or(0, |f| f as u32), core::sync::atomic::Ordering::Relaxed);
}

/// Whether this fault is planted in this process, for those that a machine has.
#[cfg(feature = "planted-fault")]
pub fn is_planted(fault: Fault) -> bool {
    planted(fault)
}

/// Whether this rule is to be left out.
#[cfg(feature = "planted-fault")]
pub(crate) fn planted(fault: Fault) -> bool {
    PLANTED.load(core::sync::atomic::Ordering::Relaxed) == fault as u32
}

/// Whether this rule is to be left out: never.
#[cfg(not(feature = "planted-fault"))]
pub(crate) const fn planted(_: Fault) -> bool {
    false
}

#[cfg(feature = "planted-fault")]
static BETWEEN: spin::Once<fn()> = spin::Once::new();

/// Has `work` done before every step of the rules that other CPUs can see or undo: there another simulated CPU may go on.
/// Only the first call counts.
#[cfg(feature = "planted-fault")]
pub fn between_steps(work: fn()) {
    BETWEEN.call_once(|| work);
}

/// Other CPUs may come between what was seen before and what is done next.
#[cfg(feature = "planted-fault")]
pub(crate) fn between() {
    if let Some(work) = BETWEEN.get() {
        work();
    }
}

/// Other CPUs may come between what was seen before and what is done next: in an image they do as they like.
#[cfg(not(feature = "planted-fault"))]
pub(crate) const fn between() {}

/// How often the words of frames have been looked up: the part of a step's work that a machine does not see.
#[derive(Debug)]
pub(crate) struct Looks(#[cfg(feature = "planted-fault")] core::sync::atomic::AtomicU64);

#[cfg(feature = "planted-fault")]
impl Looks {
    pub(crate) const fn new() -> Self {
        Self(core::sync::atomic::AtomicU64::new(0))
    }

    pub(crate) fn count(&self) {
        self.0.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
        between();
    }

    pub(crate) fn so_far(&self) -> u64 {
        self.0.load(core::sync::atomic::Ordering::Relaxed)
    }
}

/// No image counts.
#[cfg(not(feature = "planted-fault"))]
impl Looks {
    pub(crate) const fn new() -> Self {
        Self()
    }

    #[expect(clippy::unused_self, reason = "the one that counts needs it")]
    pub(crate) const fn count(&self) {}
}
