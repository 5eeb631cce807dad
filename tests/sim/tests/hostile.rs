//! Hostile guests against the whole of the rules, on 1, 2 and 4 CPUs. `SEED=` and `CPUS=` repeat a run, `STEPS=` prolongs it.

use hypercall_abi::Hypercall;
use sim::world::{Totals, hostile};

/// Calls that are not refused whatever their arguments.
const OFFERED: [Hypercall; 30] = [
    Hypercall::SetTrapTable,
    Hypercall::MmuUpdate,
    Hypercall::SetGdt,
    Hypercall::StackSwitch,
    Hypercall::SetCallbacks,
    Hypercall::FpuTaskswitch,
    Hypercall::SetDebugreg,
    Hypercall::GetDebugreg,
    Hypercall::UpdateDescriptor,
    Hypercall::MemoryOp,
    Hypercall::Multicall,
    Hypercall::UpdateVaMapping,
    Hypercall::SetTimerOp,
    Hypercall::XenVersion,
    Hypercall::ConsoleIo,
    Hypercall::GrantTableOp,
    Hypercall::VmAssist,
    Hypercall::UpdateVaMappingOtherdomain,
    Hypercall::Iret,
    Hypercall::VcpuOp,
    Hypercall::SetSegmentBase,
    Hypercall::MmuextOp,
    Hypercall::NmiOp,
    Hypercall::SchedOp,
    Hypercall::CallbackOp,
    Hypercall::EventChannelOp,
    Hypercall::PhysdevOp,
    Hypercall::Domctl,
    Hypercall::Sysctl,
    Hypercall::Tenon,
];

/// Operations without which a run means little.
const MUST_SUCCEED: &[(Hypercall, &[&str])] = &[
    (Hypercall::Domctl, &["CreateDomain", "DestroyDomain", "SetVcpuContext", "GetVcpuContext", "PauseDomain"]),
    (Hypercall::EventChannelOp, &["BindInterdomain", "BindVirq", "BindIpi", "BindVcpu", "Close", "Reset", "Send"]),
    (Hypercall::GrantTableOp, &["MapGrantRef", "UnmapGrantRef", "UnmapAndReplace", "Copy", "SetupTable"]),
    (Hypercall::MemoryOp, &["DecreaseReservation", "IncreaseReservation", "PopulatePhysmap"]),
    (Hypercall::MmuextOp, &["PinL1", "PinL2", "PinL3", "PinL4", "Unpin", "NewBaseptr", "NewUserBaseptr", "SetLdt"]),
    (Hypercall::SchedOp, &["Block", "Poll", "RemoteShutdown", "Yield"]),
    (Hypercall::VcpuOp, &["Initialise", "Up", "Down", "RegisterVcpuInfo", "SendNmi", "SetSingleshotTimer"]),
];

fn wish(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

#[test]
fn hostile_guests_never_break_a_promise() {
    let only = usize::try_from(wish("CPUS", 0)).expect("few");
    [1, 2, 4].into_iter().filter(|cpus| [0, *cpus].contains(&only)).for_each(never_break_a_promise);
}

#[test]
fn a_seed_reproduces_a_run_on_several_cpus() {
    let [one, other] = [(); 2].map(|()| run(5, 4, 4_000).expect("nothing is wrong"));
    assert_eq!(one.to_string(), other.to_string());
}

/// A run on a thread of its own: the world is made on the stack before it is put in its place.
fn run(seed: u64, cpus: usize, steps: u64) -> Result<Totals, String> {
    let life = move || hostile::run(seed, cpus, steps);
    let one = std::thread::Builder::new().stack_size(64 << 20).spawn(life);
    one.expect("a thread").join().expect("the panics of the rules are caught")
}

fn never_break_a_promise(cpus: usize) {
    const RUN: u64 = 30_000;
    let (first, steps) = (wish("SEED", 1), wish("STEPS", 240_000));
    let mut totals = Totals::default();
    for seed in first..first + steps.div_ceil(RUN) {
        match run(seed, cpus, RUN.min(steps)) {
            Ok(run) => totals.add(&run),
            Err(why) => panic!("{why}"),
        }
    }
    println!("{cpus} CPUs:\n{totals}");
    if steps < 200_000 {
        return; // too few to have seen everything
    }
    assert!(totals.followed * 3 >= totals.steps * 2, "an audit of all follows most steps at once");
    for call in Hypercall::ALL {
        assert!(totals.of(call.name()).0 > 0, "{} is called", call.name());
    }
    for call in OFFERED {
        let (tried, done) = totals.of(call.name());
        assert!(done * 50 > tried, "{}: {done} of {tried} calls succeed", call.name());
    }
    for (family, ops) in MUST_SUCCEED {
        for op in *ops {
            let done = totals.calls.get(&(family.name(), *op)).map_or(0, |n| n.1);
            // On several CPUs guests do more on purpose, and a vcpu whose context is set must not be running.
            let few = if cpus > 1 { 10 } else { 40 };
            assert!(done >= few, "{} {op} succeeds {done} times", family.name());
        }
    }
    // An episode is 4,000 steps, and what comes after it takes a few hundred.
    for (what, least) in [
        ("times everything was destroyed", steps / 6_000),
        ("steps that left a call unfinished", 1_000),
        ("instructions carried out, or faults repaired", 200),
        ("exits by SYSENTER", 100),
        ("single steps", 500),
        ("steps while other CPUs were at work", if cpus > 1 { steps / 2 } else { 0 }),
    ] {
        let seen = totals.events.get(what).copied().unwrap_or(0);
        assert!(seen >= least, "{what}: {seen}, and {least} are few");
    }
    let given_up = totals.events.get("worlds given up for lack of memory").copied().unwrap_or(0);
    assert_eq!(given_up, 0, "worlds that did not come to an end");
}
