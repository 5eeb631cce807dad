//! Domains made and ended against a hypervisor and a store that count what exists.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared by tests")]
mod common;

use common::*;
use hypercall_abi::domctl::info;
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::tenon::{Refusal, RefusalKind};
use hypercall_abi::{Errno, Hypercall};
use toolstack::config::{Action, GuestConfig};
use toolstack::create::{self, CreateError, Guest, Request, Step, unpacked};
use toolstack::end::{End, EndRequest, Outcome, end_of};
use toolstack::unpack::at_once;
use toolstack::{Access, DomainId, Summary, domains};

/// Makes a domain while nobody else has anything to do.
fn create(machine: &Shared<Machine>, tree: &Shared<Tree>, request: &Request<'_>) -> Result<Guest, CreateError> {
    at_once(create::create(machine, tree, request, async || true))
}

fn start(guest: Guest, machine: &Shared<Machine>, tree: &Shared<Tree>) -> Result<Guest, CreateError> {
    at_once(guest.start(machine, tree, async || {}, async || {}))
}

fn finish(guest: Guest, end: &End, machine: &Shared<Machine>, tree: &Shared<Tree>) -> (Outcome, Vec<String>) {
    at_once(guest.finish(end, machine, tree, async || {}))
}

fn running() -> (Shared<Machine>, Shared<Tree>, Guest) {
    let (machine, tree) = (Machine::new(), Shared::<Tree>::default());
    let (config, kernel) = (config(), kernel());
    let guest = create(&machine, &tree, &request(&config, &kernel)).unwrap();
    let guest = start(guest, &machine, &tree).unwrap();
    (machine, tree, guest)
}

fn shut_down(machine: &Shared<Machine>, guest: &Guest, reason: u32) {
    let mut machine = machine.borrow_mut();
    let domain = machine.domains.get_mut(&guest.domain.0).unwrap();
    domain.info.flags |= info::SHUTDOWN | reason << info::SHUTDOWN_SHIFT;
}

#[test]
fn a_domain_is_filled_and_set_to_start() {
    let (machine, _, guest) = running();
    let machine = machine.borrow();
    let domain = &machine.domains[&guest.domain.0];
    assert_eq!((domain.max_kib, domain.info.tot_pages), (16 << 10, 16 << 8));
    assert_eq!((domain.info.handle, domain.info.max_vcpu_id), (UUID, 1));
    assert_eq!(domain.info.flags & info::PAUSED, 0);
    assert_eq!(domain.ports, [DomainId(3); 2]);

    let context = domain.vcpu.as_ref().unwrap();
    let regs = &context.user_regs;
    assert_eq!((regs.rip, regs.rflags, regs.cs, regs.ss), (BASE, 0x202, 0xe033, 0xe02b));
    assert_eq!((context.kernel_ss, context.kernel_sp), (0xe02b, regs.rsp));
    assert_eq!((context.flags, context.ctrlreg[1]), (0x24, 0));

    // The start info, through the page the vcpu is pointed to.
    let pfn = (regs.rsi - BASE) >> 12;
    let frame = domain.m2p.iter().find(|(_, page)| **page == pfn).unwrap().0;
    let page = &domain.frames[frame];
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    assert_eq!(&page[..14], b"xen-3.0-x86_64");
    assert_eq!((word(0x20), word(0x28)), (16 << 8, 0x4_0007 << 12));
    assert_eq!(word(0x30), 0, "no flags: neither privileged nor first");
    assert_eq!((word(0x38), word(0x40)), (guest.store.page.0, 1));
    assert_eq!((word(0x48), word(0x50)), (guest.console.page.0, 2));
    assert_eq!(&page[0x80..0x8d], b"console=hvc0\0");

    // Grants 0 and 1: access for the backend to the console's and the store's page.
    let table = &domain.frames[&(GRANT_TABLE + 7)];
    for (reference, ring) in [(0, guest.console), (1, guest.store)] {
        let grant = [1u16.to_le_bytes(), 3u16.to_le_bytes()].concat();
        let frame = u32::try_from(ring.page.0).unwrap().to_le_bytes();
        assert_eq!(table[reference * 8..][..8], [grant, frame.to_vec()].concat());
    }
    assert!(table[16..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_tree_has_what_a_stock_kernel_asks_for() {
    let (_, tree, guest) = running();
    let tree = tree.borrow();
    let node = |path: &str| {
        let (value, access) = &tree.nodes[&format!("/local/domain/7{path}")];
        (value.as_str(), *access)
    };
    let vm = "/vm/abababab-abab-abab-abab-abababababab";
    assert_eq!(node(""), ("", Access::Read));
    assert_eq!(node("/vm"), (vm, Access::Read));
    assert_eq!(node("/name"), ("web", Access::Read));
    assert_eq!(node("/domid"), ("7", Access::Read));
    assert_eq!(node("/device"), ("", Access::Read));
    assert_eq!(node("/control/shutdown"), ("", Access::Own));
    assert_eq!(node("/control/feature-suspend"), ("", Access::Own));
    assert_eq!((node("/memory/target").0, node("/memory/static-max").0), ("16384", "16384"));
    assert_eq!((node("/cpu/0/availability").0, node("/cpu/1/availability").0), ("online", "online"));
    assert!(!tree.nodes.contains_key("/local/domain/7/cpu/2/availability"));
    assert_eq!(node("/store/ring-ref").0, guest.store.page.0.to_string());
    assert_eq!(node("/console/port").0, "2");
    let back = "/local/domain/3/backend/console/7/0";
    assert_eq!(node("/console/backend").0, back);
    let of_back = |key: &str| {
        let (value, access) = &tree.nodes[&format!("{back}{key}")];
        (value.as_str(), *access)
    };
    assert_eq!(of_back("/frontend"), ("/local/domain/7/console", Access::Read));
    assert_eq!(of_back("/frontend-id"), ("7", Access::Read));
    assert_eq!((of_back("/online").0, of_back("/state").0, of_back("/protocol").0), ("1", "1", "vt100"));
    assert_eq!(tree.nodes[&format!("{vm}/uuid")].0, &vm[4..]);
    assert_eq!(tree.nodes[&format!("{vm}/name")].0, "web");
    assert_eq!(tree.served[&7], (guest.store.page.0, 1));
}

#[test]
fn whatever_is_refused_nothing_is_left() {
    let (config, kernel) = (config(), kernel());
    let mut steps = Vec::new();
    for call in 1.. {
        let (machine, tree) = (Machine::new(), Shared::<Tree>::default());
        machine.borrow_mut().refusal.after = Some(call);
        let made = create(&machine, &tree, &request(&config, &kernel)).and_then(|guest| start(guest, &machine, &tree));
        let Err(error) = made else { break };
        assert!(error.to_string().starts_with("guest web: "), "{error}");
        assert!(error.to_string().ends_with(" refused"), "{error}");
        assert_eq!(error.left_over, [""; 0]);
        assert!(
            machine.borrow().domains.is_empty() && tree.borrow().nodes.is_empty() && tree.borrow().served.is_empty(),
            "{error}"
        );
        assert_eq!(machine.borrow().free, 100_000);
        steps.push(error.step);
    }
    steps.dedup();
    let all = [
        Step::CreateDomain,
        Step::LimitMemory,
        Step::FindSharedInfo,
        Step::Populate,
        Step::OpenPorts,
        Step::Fill,
        Step::SeedGrants,
        Step::PinRoot,
        Step::SetVcpu,
        Step::Unpause,
    ];
    assert_eq!(steps, all);

    for (call, step) in [(1, Step::WriteTree), (2, Step::Introduce)] {
        let (machine, tree) = (Machine::new(), Shared::<Tree>::default());
        tree.borrow_mut().refusal.after = Some(call);
        let made = create(&machine, &tree, &request(&config, &kernel)).and_then(|guest| start(guest, &machine, &tree));
        assert_eq!(made.unwrap_err().step, step);
        assert!(
            machine.borrow().domains.is_empty() && tree.borrow().nodes.is_empty() && tree.borrow().served.is_empty()
        );
    }
}

#[test]
fn what_cannot_be_undone_is_told() {
    let (machine, tree, guest) = running();
    tree.borrow_mut().refusal.after = Some(4);
    machine.borrow_mut().domains.clear();
    let left_over = at_once(guest.destroy(&machine, &tree, async || {}));
    assert_eq!(left_over, ["/local/domain/7: remove refused", "domain 7: ESRCH"]);
    assert!(tree.borrow().served.is_empty());
}

#[test]
fn a_bad_kernel_makes_no_domain() {
    let (machine, tree) = (Machine::new(), Shared::<Tree>::default());
    let config = config();
    let refusal = at_once(unpacked(&config, b"#!/bin/sh", (1 << 20, 1 << 20), async || {})).unwrap_err().to_string();
    assert_eq!(refusal, "guest web: unpacking the kernel: neither an ELF file, gzip'ed or not, nor a bzImage");
    let refusal = create(&machine, &tree, &request(&config, b"\x7fELF")).unwrap_err().to_string();
    assert_eq!(refusal, "guest web: planning its memory: not an ELF file, or its header is cut off");
    let small = GuestConfig { memory: 1, ..config.clone() };
    let error = create(&machine, &tree, &request(&small, &kernel())).unwrap_err().to_string();
    assert_eq!(
        error,
        "guest web: planning its memory: too little memory: needs 4 MiB at least for the kernel and its ramdisk, has 1 MiB"
    );
}

#[test]
fn a_machine_without_memory_says_how_much_it_had() {
    let (machine, tree) = (Machine::new(), Shared::<Tree>::default());
    machine.borrow_mut().free = 1000;
    let (config, kernel) = (config(), kernel());
    let error = create(&machine, &tree, &request(&config, &kernel)).unwrap_err();
    assert_eq!(error.to_string(), "guest web: giving it memory: the machine has only 3 of 16 MiB left");
    assert_eq!(machine.borrow().free, 1000);
    let huge = GuestConfig { memory: 1 << 30, ..config };
    let error = create(&machine, &tree, &request(&huge, &kernel)).unwrap_err();
    assert!(matches!(error.step, Step::Plan | Step::Populate), "{error}");
    assert!(machine.borrow().domains.is_empty());
}

#[test]
fn every_end_has_its_action() {
    let ends = [
        (0, "powered off", Action::Destroy),
        (1, "rebooted", Action::Restart),
        (2, "suspended itself", Action::Destroy),
        (3, "crashed", Action::Preserve),
        (4, "missed its watchdog", Action::Preserve),
        (99, "ended for an unknown reason", Action::Preserve),
    ];
    for (number, verb, action) in ends {
        let (machine, tree, mut guest) = running();
        guest.config.on_crash = Action::Preserve;
        assert_eq!(end_of(&machine, &guest).unwrap(), None);
        shut_down(&machine, &guest, number);
        let end = end_of(&machine, &guest).unwrap().unwrap();
        assert_eq!(end.reason, ShutdownReason::from_number(number.into()));
        assert_eq!(end.action, action);
        assert!(end.report.starts_with(&format!("guest web (domain 7) {verb}")), "{}", end.report);
        let config = guest.config.clone();
        let (outcome, left_over) = finish(guest.clone(), &end, &machine, &tree);
        assert_eq!(left_over, [""; 0]);
        let expected = match action {
            Action::Destroy => Outcome::Gone,
            Action::Restart => Outcome::Restart(config),
            Action::Preserve => Outcome::Preserved(guest),
        };
        assert_eq!(outcome, expected);
        let kept = action == Action::Preserve;
        assert_eq!(
            (machine.borrow().domains.is_empty(), tree.borrow().nodes.is_empty(), tree.borrow().served.is_empty()),
            (!kept, !kept, !kept)
        );
    }
}

#[test]
fn a_crash_is_reported_with_registers() {
    let (machine, _, guest) = running();
    shut_down(&machine, &guest, 3);
    let mut changed = machine.borrow_mut();
    let domain = changed.domains.get_mut(&7).unwrap();
    domain.crash = Some((0, "page fault at \x1b[2J 0x0 without a handler".into()));
    let context = domain.vcpu.as_mut().unwrap();
    context.user_regs.rbx = 0xb0b;
    context.ctrlreg[3] = 0x1234_5000;
    drop(changed);
    let report = end_of(&machine, &guest).unwrap().unwrap().report;
    let mut lines = report.lines();
    let first = "guest web (domain 7) crashed: vcpu 0: page fault at ?[2J 0x0 without a handler";
    assert_eq!(lines.next(), Some(first));
    let second = lines.next().unwrap();
    assert!(second.starts_with("  rip e033:ffffffff80000000 rsp e02b:"), "{second}");
    assert!(second.ends_with("rflags 202 cr3 12345000"), "{second}");
    assert!(report.contains("rbx 0000000000000b0b"), "{report}");
    assert_eq!(lines.count(), 4);
}

/// What a guest was refused is told if it crashed, or if it ended without a word.
#[test]
fn what_was_refused_last_is_told_with_an_end_nobody_can_explain() {
    let told = |reason, silent, refusals: &[Refusal]| {
        let (machine, _, guest) = running();
        shut_down(&machine, &guest, reason);
        {
            let mut machine = machine.borrow_mut();
            let kept = &mut machine.domains.get_mut(&7).unwrap().refusals;
            kept.count = refusals.len() as u64;
            kept.list[..refusals.len()].copy_from_slice(refusals);
        }
        end_of(&machine, &guest).unwrap().unwrap().told(silent)
    };
    let refusal = |kind: RefusalKind, number, args| {
        let errno = if kind == RefusalKind::Call { Errno::Inval as u32 } else { 0 };
        Refusal { kind: kind as u32, vcpu: 1, errno, times: 1, number, args }
    };
    let all = [
        refusal(RefusalKind::Call, Hypercall::MmuUpdate.number(), [0x1000, 0xf0063]),
        Refusal { times: 3, ..refusal(RefusalKind::ReadMsr, 0xffff_ffff_8100_0000, [0x1a0, 0]) },
        refusal(RefusalKind::Instruction, 0x4000, [0xcc90_9090_9010_010f, 0]),
        refusal(RefusalKind::Call, 99, [1, 2]),
        Refusal { kind: 77, ..refusal(RefusalKind::WriteMsr, 0, [0, 0]) },
    ];
    let crash = told(3, false, &all);
    let lines: Vec<&str> = crash.lines().skip_while(|line| !line.contains("had refused it")).skip(1).collect();
    assert_eq!(
        lines,
        [
            "    vcpu 1: MmuUpdate 0x1000 0xf0063: Inval",
            "    vcpu 1: rdmsr 0x1a0: fault 13, rip 0xffffffff81000000 (3 times)",
            "    vcpu 1: instruction 0f 01 10 90 90 90 90 cc: fault 13, rip 0x4000",
            "    vcpu 1: call 99 0x1 0x2: Inval",
            "    vcpu 1: something (77)",
        ]
    );
    assert!(!told(3, false, &[]).contains("refused"));
    assert_eq!(told(0, false, &all), "guest web (domain 7) powered off");
    let silent = told(0, true, &all);
    assert!(silent.contains("powered off\n  it had printed nothing\n  the hypervisor had refused it"), "{silent}");
}

#[test]
fn a_domain_that_vanished_has_ended() {
    let (machine, _, guest) = running();
    machine.borrow_mut().domains.clear();
    let end = end_of(&machine, &guest).unwrap().unwrap();
    assert_eq!(end.report, "guest web (domain 7) is gone");
}

#[test]
fn a_guest_is_asked_through_the_node_it_watches() {
    let (_, tree, guest) = running();
    for (wish, value) in [(EndRequest::Poweroff, "poweroff"), (EndRequest::Reboot, "reboot")] {
        guest.ask(wish, &tree).unwrap();
        assert_eq!(tree.borrow().nodes["/local/domain/7/control/shutdown"], (value.into(), Access::Own));
    }
}

#[test]
fn memory_and_name_are_set_in_the_tree() {
    let (_, tree, mut guest) = running();
    guest.set_memory_target(12, &tree).unwrap();
    assert_eq!(tree.borrow().nodes["/local/domain/7/memory/target"], ("12288".into(), Access::Read));
    guest.rename("shop", &tree).unwrap();
    assert_eq!(guest.config.name, "shop");
    assert_eq!(tree.borrow().nodes["/local/domain/7/name"], ("shop".into(), Access::Read));
    assert!(tree.borrow().nodes.iter().any(|(path, node)| path.starts_with("/vm/") && node.0 == "shop"));
}

#[test]
fn domains_are_listed() {
    let (machine, tree, _) = running();
    let (config, kernel) = (config(), kernel());
    create(&machine, &tree, &request(&config, &kernel)).unwrap();
    let all = domains(&machine).unwrap();
    assert_eq!(all.iter().map(|domain| domain.domain).collect::<Vec<_>>(), [7, 8]);
    assert_eq!(Summary(&all[0]).to_string(), "    7       16     1 -----       0.0");
    assert_eq!(Summary(&all[1]).to_string(), "    8       16     1 --p--       0.0");
}
