//! The manager of guests: every verb, every refusal, and what guests do at the wrong moment.
#![forbid(unsafe_code)]

mod archive;
#[allow(dead_code, reason = "shared by tests")]
mod common;
#[allow(dead_code, reason = "shared by tests")]
mod world;

use hypercall_abi::domctl::info;
use serde_json::{Value, json};
use toolstack::create::PIECE;
use toolstack::manager::{DiskRow, Disks, Mark, Refusal, Reply, Wait};
use toolstack::status::Failure;
use toolstack::{DomainId, end::EndRequest};
use world::World;

const WEB: &str = "name = 'web'\nmemory = 16\nmaxmem = 24\nkernel = 'k'\n";
const DB: &str = "name = 'db'\nmemory = 8\nvcpus = 2\nkernel = 'k'\n";
const POWEROFF: u32 = 0;
const REBOOT: u32 = 1;
const CRASH: u32 = 3;
const SECOND: u64 = 1_000_000_000;

#[test]
fn guests_of_the_bundle_are_made_in_order() {
    let mut world = World::planned(&[WEB, DB]);
    assert_eq!(world.text("pause web"), "guest web is being made or ended; try again");
    let planned = "name                    id      MiB vcpus state   seconds\n\
                   web                      -       16     1 -----         -\n\
                   db                       -        8     2 -----         -";
    assert_eq!(world.text("list"), planned);
    world.begin();
    world.settle();
    let made = "name                    id      MiB vcpus state   seconds\n\
                web                      7       16     1 -----       0.0\n\
                db                       8        8     1 -----       0.0";
    assert_eq!(world.text("list"), made);
    assert_eq!(
        world.json("list")[1],
        json!({"name": "db", "domid": 8, "memory_mib": 8, "vcpus": 1, "state": "-----", "seconds": 0.0})
    );
    assert_eq!((world.manager.failed(), world.told()), (None, vec![]));
    assert_eq!((world.manager.first_alive().as_deref(), world.manager.all_ended()), (Some("web"), false));
}

#[test]
fn what_is_wrong_with_the_bundle_is_told_and_the_others_are_made() {
    let mut world = World::planned(&["name = 'a'\nmemory = 8\nkernel = 'none'\n", WEB, WEB, "memory = 3"]);
    world.begin();
    world.settle();
    let told = [
        "error: guest web: there is one of this name already",
        "error: guests/3/config: missing field `name`",
        "error: guest a: the boot bundle has no entry `none`",
    ];
    assert_eq!(world.told(), told);
    assert_eq!(world.manager.failed(), Some(Failure::NotMade));
    assert_eq!(world.manager.names(), ["a", "web"]);
    assert!(world.manager.is_alive("web") && !world.manager.is_alive("a"));
    assert_eq!(World::of(&[]).told(), ["error: the boot bundle has no guests"]);
}

/// Every verb that is about a guest is carried out, and refused for one there is not, or that has ended.
#[test]
fn every_verb_is_carried_out_or_refused() {
    let mut world = World::running(&[WEB, DB]);
    let paused = |world: &World| world.fake().machine.borrow().domains[&7].info.flags & info::PAUSED != 0;
    assert_eq!(world.ask("pause web"), Ok(Reply::Done { verb: "pause", name: "web".into() }));
    assert!(paused(&world));
    assert_eq!(world.json("unpause 7"), json!({"done": "unpause", "name": "web"}));
    assert!(!paused(&world));
    assert_eq!((world.text("domid web"), world.json("domid 7")), ("7".into(), json!({"name": "web", "domid": 7})));
    world.pass(3723 * SECOND);
    assert_eq!((world.text("uptime web"), world.json("uptime")["seconds"].clone()), ("1:02:03".into(), json!(3723)));
    assert_eq!(world.ask("console web"), Ok(Reply::Console("web".into())));
    assert_eq!(world.ask("quit"), Ok(Reply::Quit));
    assert!(world.text("help").contains("mem-set") && world.text("help dmesg").contains("-c"));
    assert_eq!(world.text("create web"), "guest web exists");

    assert_eq!(world.text("mem-set web 20"), "");
    assert_eq!(world.fake().machine.borrow().domains[&7].max_kib, 20 << 10);
    assert_eq!(world.fake().tree.borrow().nodes["/local/domain/7/memory/target"].0, "20480");
    assert_eq!(world.text("mem-set web 25"), "guest web may have 1 to 24 MiB");
    assert_eq!(world.text("mem-set web 0"), "guest web may have 1 to 24 MiB");
    let free = std::mem::replace(&mut world.fake().machine.borrow_mut().free, 512);
    assert_eq!(world.text("mem-set web 19"), "guest web has 16 MiB, and the machine only 2 more");
    world.fake().machine.borrow_mut().free = free;

    assert_eq!(world.text("rename web db"), "there is a guest db already");
    assert!(world.text("rename web 12").starts_with("12: 1 to 64 letters"));
    assert_eq!(world.json("rename web shop"), json!({"done": "rename", "name": "shop"}));
    assert_eq!(world.fake().tree.borrow().nodes["/local/domain/7/name"].0, "shop");
    assert_eq!(world.manager.console("shop").unwrap().name.borrow().as_str(), "shop");
    for verb in ["create", "console", "pause", "unpause", "destroy", "domid", "shutdown", "reboot", "uptime"] {
        assert_eq!(world.text(&format!("{verb} web")), "there is no guest web");
    }
    assert_eq!(world.json("mem-set web\u{1b} 3"), json!({"error": "there is no guest web\\u{1b}"}));

    assert_eq!(world.json("destroy shop"), json!({"done": "destroy", "name": "shop"}));
    for verb in ["pause", "unpause", "domid", "shutdown", "reboot", "uptime"] {
        assert_eq!(world.text(&format!("{verb} shop")), "guest shop has ended");
    }
    assert_eq!(world.text("destroy shop"), "guest shop has ended already");
    assert_eq!(world.text("rename shop web"), "");
    assert_eq!(world.text("create web"), "guest web is domain 9");
    assert_eq!(world.text("destroy web"), "");
    assert_eq!(world.text("destroy 8"), "");
    assert_eq!((world.left(), world.manager.all_ended()), (vec![], true));
}

#[test]
fn the_machine_and_the_log_are_told() {
    let mut world = World::running(&[WEB]);
    world.fake().machine.borrow_mut().log = [&[b'x'; 3000][..], b"\n(1) \x1b[2J\xff\n"].concat();
    let log = world.json("dmesg -c");
    assert_eq!(log, json!(["x".repeat(3000), "(1) \\u{1b}[2J\\u{fffd}"]));
    assert_eq!((world.json("dmesg"), world.text("dmesg")), (json!([]), String::new()));
    let Ok(Reply::Info(info)) = world.ask("info") else { panic!() };
    assert_eq!((info.total_mib, info.domains, info.cpus, info.each_guest_kib), (781, 1, 2, 300));
    assert_eq!(info.hypervisor_kib, (200_000 - common::FREE as u64) * 4);
    assert!(world.text("info").starts_with("version      Tenon "), "{}", world.text("info"));
    assert_eq!(world.json("info")["abi"], "4.17.0-fake");
    world.fake().machine.borrow_mut().refusal.after = Some(0);
    for line in ["list", "info", "dmesg"] {
        let mut machine = world.fake().machine.borrow_mut();
        machine.refusal.after = Some(machine.refusal.calls + 1);
        drop(machine);
        assert!(world.text(line).ends_with(" refused"), "{line}: {}", world.text(line));
    }
}

#[test]
fn the_disks_of_the_machine_are_listed() {
    let mut world = World::running(&[WEB]);
    assert_eq!((world.text("disks"), world.json("disks")), ("no disks".into(), json!([])));
    let disk = |serial: Option<&str>, bytes, block_bytes, read_only| DiskRow {
        serial: serial.map(Into::into),
        bytes,
        block_bytes,
        read_only,
        what: "virtio disk at 00:03.0".into(),
    };
    let disks = [
        disk(Some("tenon0"), 3 << 30, 512, false),
        disk(Some("a\\x1b"), 65 << 20, 4096, true),
        disk(None, 1536, 512, false),
        disk(None, 0, 512, true),
    ];
    world.fake().disks.replace(disks.to_vec());
    let text = "serial                     size block access what\n\
                tenon0                    3 GiB   512 rw     virtio disk at 00:03.0\n\
                a\\x1b                    65 MiB  4096 ro     virtio disk at 00:03.0\n\
                -                        1536 B   512 rw     virtio disk at 00:03.0\n\
                -                           0 B   512 ro     virtio disk at 00:03.0";
    assert_eq!(world.text("disks"), text);
    let what = "virtio disk at 00:03.0";
    let first = json!({"serial": "tenon0", "bytes": 3u64 << 30, "block_bytes": 512, "read_only": false, "what": what});
    let third = json!({"serial": null, "bytes": 1536, "block_bytes": 512, "read_only": false, "what": what});
    let listed = world.json("disks");
    assert_eq!((&listed[0], &listed[2]), (&first, &third));
    assert_eq!(listed[1]["serial"], "a\\x1b");
}

#[test]
fn ends_have_their_consequences_and_are_remembered() {
    let wants = "on_poweroff = 'destroy'\non_crash = 'preserve'\non_watchdog = 'destroy'\n";
    let mut world = World::running(&[&format!("{WEB}{wants}"), &format!("{DB}{wants}")]);
    world.pass(61 * SECOND);
    world.shut_down(7, POWEROFF);
    assert_eq!(world.told(), ["guest web (domain 7) powered off\n  it had printed nothing"]);
    assert_eq!((world.manager.failed(), world.manager.all_ended()), (None, false));
    assert_eq!(world.fake().tree.borrow().shut_down, [7]);
    let row = "web                      -       16     1 ended         -  powered off at 0:01:01 as domain 7";
    assert_eq!(world.text("list -a").lines().last(), Some(row));
    let ended = &world.json("list -a")[1]["ended"];
    assert_eq!((&ended["how"], &ended["uptime"], &ended["domid"]), (&json!("powered off"), &json!(61), &json!(7)));

    world.manager.console("db").unwrap().talks.set(true);
    world.shut_down(8, CRASH);
    assert!(world.told()[0].starts_with("guest db (domain 8) crashed: the guest itself said so\n  rip e033:"));
    assert_eq!(world.manager.failed(), Some(Failure::Crashed));
    // It is kept, to be looked at, and nobody attends to its console any more.
    assert!(world.text("list").contains("db                       8        8     1 ---s-"), "{}", world.text("list"));
    assert_eq!((world.manager.is_alive("db"), world.manager.all_ended()), (false, false));
    assert_eq!(world.text("destroy db"), "");
    assert_eq!((world.left(), world.manager.all_ended()), (vec![], true));
    assert_eq!(world.manager.failed(), Some(Failure::Crashed), "the first counts");
}

#[test]
fn a_guest_that_reboots_is_made_again_but_not_more_than_once_a_second() {
    let mut world = World::running(&[WEB]);
    world.shut_down(7, REBOOT);
    assert_eq!(world.text("domid web"), "guest web has ended");
    assert!(world.manager.is_alive("web"));
    assert_eq!(world.text("rename web shop"), "guest web is being made or ended; try again");
    assert_eq!(world.text("create web"), "guest web exists");
    world.pass(SECOND / 2);
    assert_eq!(world.text("domid web"), "guest web has ended");
    world.pass(SECOND / 2);
    assert_eq!(world.text("domid web"), "8");
    // One that has lived long enough is made at once.
    world.pass(5 * SECOND);
    world.shut_down(8, REBOOT);
    assert_eq!(world.text("domid web"), "9");
    // One that waits can be given up.
    world.shut_down(9, REBOOT);
    assert_eq!(world.text("destroy web"), "");
    world.pass(10 * SECOND);
    assert_eq!((world.left(), world.manager.all_ended()), (vec![], true));
    assert!(world.text("list -a").ends_with("was given up at 0:00:06"), "{}", world.text("list -a"));
    assert_eq!(world.manager.failed(), None);
}

#[test]
fn a_reboot_that_is_not_wanted_is_a_failure() {
    let mut world = World::running(&[&format!("{WEB}on_reboot = 'destroy'\n")]);
    world.shut_down(7, REBOOT);
    assert_eq!((world.manager.failed(), world.manager.all_ended()), (Some(Failure::Rebooted), true));
}

/// A wish is waited for until it has come true, or cannot any more.
#[test]
fn wishes_are_waited_for() {
    let wait = |world: &mut World, asked: Reply| {
        let Reply::Asked { wait, .. } = asked else { panic!("{asked:?}") };
        let outcome = std::rc::Rc::new(std::cell::RefCell::new(None));
        let (manager, to) = (world.manager.clone(), outcome.clone());
        world.spawn(async move {
            let result = manager.wait(&wait).await;
            to.replace(Some(result));
        });
        world.settle();
        outcome
    };
    let mut world = World::running(&[WEB, DB]);
    let node = |world: &World, domain| {
        world.fake().tree.borrow().nodes[&format!("/local/domain/{domain}/control/shutdown")].0.clone()
    };
    let asked = world.ask("reboot -w web").unwrap();
    assert_eq!(
        asked,
        Reply::Asked {
            verb: "reboot",
            wait: Wait { name: "web".into(), domain: DomainId(7), wish: EndRequest::Reboot }
        }
    );
    assert_eq!((asked.json(), node(&world, 7)), (r#"{"done":"reboot","name":"web"}"#.into(), "reboot".into()));
    let outcome = wait(&mut world, asked);
    world.shut_down(7, REBOOT);
    assert_eq!(*outcome.borrow(), None, "it waits to be made again");
    world.pass(SECOND);
    assert_eq!(outcome.take(), Some(Ok(())));

    let asked = world.ask("shutdown db").unwrap();
    assert_eq!(node(&world, 8), "poweroff");
    let outcome = wait(&mut world, asked);
    world.shut_down(8, POWEROFF);
    assert_eq!(outcome.take(), Some(Ok(())));

    let asked = world.ask("reboot web").unwrap();
    let outcome = wait(&mut world, asked);
    world.shut_down(9, POWEROFF);
    assert_eq!(outcome.take(), Some(Err(Refusal::DidNotComeBack("web".into()))));
}

/// Two that ask at once both get their guest, one after the other; others are answered in between.
#[test]
fn a_second_create_waits_for_the_first() {
    let mut world = World::running(&[WEB, DB]);
    world.ask("destroy web").unwrap();
    world.ask("destroy db").unwrap();
    world.fake().marks.take();
    let (web, db, again) =
        (world.begin_asking("create web"), world.begin_asking("create db"), world.begin_asking("create web"));
    for _ in 0..5 {
        assert!(world.round());
    }
    assert_eq!((web.borrow().is_none(), db.borrow().is_none()), (true, true), "they take longer");
    let list = world.begin_asking("list");
    world.round();
    let list = list.take().expect("a list is not held up").unwrap().text();
    let lines: Vec<&str> = list.lines().skip(1).collect();
    assert!(lines[0].starts_with("web                      9 "), "{list}: it has a domain already");
    assert_eq!(lines[1..], ["db                       -        8     2 -----         -"]);
    world.settle();
    assert_eq!(web.take(), Some(Ok(Reply::Created { name: "web".into(), domain: DomainId(9) })));
    assert_eq!(db.take(), Some(Ok(Reply::Created { name: "db".into(), domain: DomainId(10) })));
    assert_eq!(again.take(), Some(Err(Refusal::Exists("web".into()))));
    let one = [Mark::CreateBegins, Mark::CreateEnds];
    assert_eq!(*world.fake().marks.borrow(), [one, one].concat());
}

/// What is asked of a guest that is being made or ended is answered when that is over.
#[test]
fn a_guest_in_between_is_asked_when_it_is_there() {
    let mut world = World::running(&[WEB]);
    world.pass(SECOND);
    world.fake().machine.borrow_mut().domains.get_mut(&7).unwrap().info.flags |=
        info::SHUTDOWN | REBOOT << info::SHUTDOWN_SHIFT;
    world.manager.look_again();
    for _ in 0..3 {
        world.round();
    }
    let asked = world.begin_asking("domid web");
    world.round();
    assert!(asked.borrow().is_none());
    world.settle();
    assert_eq!(asked.take(), Some(Ok(Reply::Domid { name: "web".into(), domain: DomainId(8) })));
    let destroyed = world.begin_asking("destroy web");
    world.round();
    let asked = world.begin_asking("pause web");
    world.round();
    assert_eq!((destroyed.borrow().is_none(), asked.borrow().is_none()), (true, true));
    world.settle();
    assert_eq!(asked.take(), Some(Err(Refusal::HasEnded("web".into()))));
}

/// However large a guest is, its making and its end let others run after every 512 pages.
#[test]
fn nobody_stands_still_for_more_than_a_piece() {
    let large = "name = 'large'\nmemory = 256\nkernel = 'k'\n";
    let mut world = World::running(&[large]);
    let pauses = world.fake().pauses.get();
    assert!(pauses >= 256 << 8 >> 9, "{pauses} pauses for {} pages", 256 << 8);
    assert_eq!(world.ask("destroy large"), Ok(Reply::Done { verb: "destroy", name: "large".into() }));
    assert!(world.fake().pauses.get() >= pauses + (256 << 8 >> 9) - 1);
    let longest = world.fake().longest.get();
    assert!((256..=usize::try_from(PIECE).unwrap()).contains(&longest), "{longest} pages in a turn");
    assert_eq!(world.left(), [""; 0]);
}

/// A guest is given up at each pause of its making.
#[test]
fn a_guest_given_up_while_it_is_made_leaves_nothing() {
    let mut given_up = 0;
    for pause in 1.. {
        let mut world = World::planned(&[WEB, DB]);
        world.begin();
        while world.fake().pauses.get() < pause && world.round() {}
        if world.fake().pauses.get() < pause {
            break;
        }
        let destroyed = world.ask("destroy web");
        assert_eq!(destroyed, Ok(Reply::Done { verb: "destroy", name: "web".into() }), "pause {pause}");
        given_up += usize::from(world.text("list -a").contains("was given up"));
        assert!(world.manager.is_alive("db"), "the next one is made");
        assert!(world.text("create web").starts_with("guest web is domain "), "and it can be made again");
        for name in ["web", "db"] {
            world.ask(&format!("destroy {name}")).unwrap();
        }
        assert_eq!((world.left(), world.told(), world.manager.failed()), (vec![], vec![], None), "pause {pause}");
    }
    assert!(given_up > 8, "{given_up}");
}

/// Refuses the call `call` after this, of one of the fakes, and answers whether it came to that.
fn refuse(world: &World, call: usize) {
    let mut machine = world.fake().machine.borrow_mut();
    machine.refusal.after = Some(machine.refusal.calls + call);
}

/// Each call of the hypervisor and of the store is refused once while a guest is made.
#[test]
fn whatever_is_refused_the_manager_goes_on_and_nothing_is_left() {
    let refuse_store = |world: &World, call: usize| {
        let mut tree = world.fake().tree.borrow_mut();
        tree.refusal.after = Some(tree.refusal.calls + call);
    };
    for (who, refuse, least) in [("hypervisor", &refuse as &dyn Fn(&World, usize), 50), ("store", &refuse_store, 2)] {
        let mut refused = 0;
        for call in 1.. {
            let mut world = World::planned(&[WEB]);
            refuse(&world, call);
            world.begin();
            world.settle();
            let told = world.told();
            if world.manager.is_alive("web") {
                // Looking for ends asks the hypervisor as well; that it was refused is told, and nothing else happens.
                assert!(told.iter().all(|line| line.ends_with("info refused")), "{told:?}");
                break;
            }
            refused += 1;
            assert!(told.len() == 1 && told[0].starts_with("error: ") && told[0].ends_with("refused"), "{told:?}");
            assert_eq!((world.left(), world.manager.failed()), (vec![], Some(Failure::NotMade)), "{who}, call {call}");
            assert!(world.text("list -a").contains("web                      -       16     1 ended"));
            assert_eq!(world.text("create web"), "guest web is domain 8".replace('8', &domain_after(&told[0])));
        }
        assert!(refused >= least, "{who}: {refused}");
    }
}

/// The first domain is 7; one that was refused has none.
fn domain_after(told: &str) -> String {
    let none = ["physinfo", "creating the domain", "planning"].iter().any(|step| told.contains(step));
    if none { "7".into() } else { "8".into() }
}

#[test]
fn without_memory_or_a_console_no_guest_is_made() {
    let mut world = World::planned(&[WEB]);
    world.fake().tree.borrow_mut().full = true;
    world.begin();
    world.settle();
    let why = "error: guest web: dom0 needs 300 KiB to serve it, and the machine has not as much left";
    assert_eq!((world.told(), world.left()), (vec![why.to_string()], vec![]));
    world.fake().tree.borrow_mut().full = false;
    world.fake().consoles_broken.set(true);
    assert_eq!(world.text("create web"), "guest web was not made");
    assert_eq!((world.told(), world.left()), (vec!["error: guest web: its console page: broken".to_string()], vec![]));
    world.fake().consoles_broken.set(false);
    world.fake().machine.borrow_mut().free = 5000;
    assert_eq!(world.text("create web"), "guest web was not made");
    assert_eq!(world.told(), ["error: guest web: 16 MiB of memory, and the machine has 15 MiB left"]);
    world.fake().machine.borrow_mut().free = common::FREE;
    assert_eq!(world.text("create web"), "guest web is domain 8");
}

/// The domain is gone at each pause of its making: another with authority has destroyed it.
#[test]
fn a_domain_that_vanishes_while_it_is_made_is_no_guest() {
    let mut vanished = 0;
    for pause in 1.. {
        let mut world = World::planned(&[WEB]);
        world.fake().at_pause.replace(Some((
            pause,
            Box::new(|fake| {
                let mut machine = fake.machine.borrow_mut();
                machine.domains.clear();
                machine.free = common::FREE;
            }),
        )));
        world.begin();
        world.settle();
        if world.fake().pauses.get() < pause {
            break;
        }
        if !world.manager.is_alive("web") {
            vanished += 1;
            assert!(world.told()[0].contains("ESRCH"), "pause {pause}");
            assert_eq!((world.left(), world.manager.failed()), (vec![], Some(Failure::NotMade)), "pause {pause}");
            assert!(world.text("create web").starts_with("guest web is domain "));
        }
    }
    assert!(vanished > 8, "{vanished}");
}

/// A guest ends while another is made, at each pause of that; and one is destroyed while it is being buried.
#[test]
fn ends_and_makings_do_not_hinder_each_other() {
    for pause in 1.. {
        let mut world = World::running(&[WEB, DB]);
        world.ask("destroy web").unwrap();
        let made = world.begin_asking("create web");
        let before = world.fake().pauses.get();
        while world.fake().pauses.get() < before + pause && world.round() {}
        if made.borrow().is_some() {
            break;
        }
        world.fake().machine.borrow_mut().domains.get_mut(&8).unwrap().info.flags |=
            info::SHUTDOWN | CRASH << info::SHUTDOWN_SHIFT;
        world.manager.look_again();
        let destroyed = world.begin_asking("destroy db");
        world.settle();
        assert_eq!(made.take(), Some(Ok(Reply::Created { name: "web".into(), domain: DomainId(9) })));
        let refusal = Some(Err(Refusal::EndedAlready("db".into())));
        let done = Some(Ok(Reply::Done { verb: "destroy", name: "db".into() }));
        let reply = destroyed.take();
        assert!(reply == refusal || reply == done, "{reply:?}");
        world.ask("destroy web").unwrap();
        assert_eq!(world.left(), [""; 0], "pause {pause}");
    }
}

/// Each call is refused once while a guest that crashed is buried: what could not be undone is told, the rest is undone.
#[test]
fn an_end_goes_on_whatever_is_refused() {
    let mut told = Vec::new();
    for call in 1..12 {
        let mut world = World::running(&[WEB]);
        let mut machine = world.fake().machine.borrow_mut();
        machine.domains.get_mut(&7).unwrap().info.flags |= info::SHUTDOWN | CRASH << info::SHUTDOWN_SHIFT;
        drop(machine);
        refuse(&world, call);
        world.manager.look_again();
        world.settle();
        // One that could not be looked at is looked at when something else changes.
        world.manager.look_again();
        world.settle();
        assert!(!world.manager.is_alive("web"), "call {call}");
        let lines = world.told();
        if lines.iter().any(|line| line.contains("left over")) {
            assert_eq!(world.fake().tree.borrow().nodes.len(), 0);
        } else {
            assert_eq!(world.left(), [""; 0], "call {call}: {lines:?}");
        }
        told.extend(lines);
    }
    let part = |what: &str| told.iter().any(|line| line.contains(what));
    assert!(part("error: guest web: info refused") && part("no registers: vcpu refused"), "{told:?}");
    assert!(part("guest web; left over: domain 7: destroy refused"), "{told:?}");
}

/// So many ends are kept with what the hypervisor said; of an older one only how and when.
#[test]
fn old_reports_give_way() {
    let configs: Vec<String> = (0..20).map(|n| format!("name = 'g{n}'\nmemory = 4\nkernel = 'k'\n")).collect();
    let mut world = World::running(&configs.iter().map(String::as_str).collect::<Vec<_>>());
    for domain in 7..27 {
        world.pass(SECOND);
        world.shut_down(domain, POWEROFF);
    }
    let Value::Array(rows) = world.json("list -a") else { panic!() };
    let reports: Vec<bool> = rows.iter().map(|row| row["ended"]["report"] != "").collect();
    assert_eq!(reports, [[false; 4].as_slice(), &[true; 16]].concat());
}

const DISKS: &str = "disk = ['memory:1M,,xvda,w', 'serial:a,,xvdb,w']\n";

/// A guest with two disks is made, and loses them when it ends, however it ends.
#[test]
fn a_guest_gets_its_disks_and_leaves_none() {
    for end in ["crash", "destroy web", "reboot"] {
        let mut world = World::running(&[&format!("{WEB}{DISKS}")]);
        let text = "guest                vdev    mode state         reads       KiB    writes       KiB errors overlay KiB  target\n\
                    web                  xvda    w    connected         1         8         2        16      7          12  memory:1048576\n\
                    web                  xvdb    w    connected         1         8         2        16      7          12  serial:a";
        assert_eq!((world.text("block-list"), world.text("block-list web")), (text.into(), text.into()));
        let first = json!({
            "name": "web", "domid": 7, "vdev": "xvda", "device": 51712, "target": "memory:1048576", "mode": "w",
            "state": "connected", "reads": 1, "writes": 2, "flushes": 3, "discards": 4, "sectors_read": 16,
            "sectors_written": 33, "errors": 7, "overlay_kib": 12
        });
        assert_eq!(world.json("block-list")[0], first);
        match end {
            "crash" => world.shut_down(7, CRASH),
            "reboot" => {
                world.shut_down(7, REBOOT);
                world.pass(SECOND);
                assert_eq!(world.json("block-list")[1]["domid"], 8, "the guest has its disks again");
                world.shut_down(8, POWEROFF);
            }
            verb => assert_eq!(world.text(verb), ""),
        }
        assert_eq!((world.left(), world.text("block-list")), (vec![], "no disks".into()), "{end}");
        assert_eq!(world.text("block-list web"), "guest web has ended");
    }
}

#[test]
fn a_guest_whose_disk_cannot_be_attached_is_not_made() {
    let mut world = World::planned(&[&format!("{WEB}{DISKS}"), &format!("{DB}disk = ['serial:a,,xvda,w']")]);
    world.fake().guest_disks.broken.replace("xvdb".into());
    world.begin();
    world.settle();
    assert_eq!(world.told(), ["error: guest web: disk xvdb: it is broken"]);
    assert!(!world.manager.is_alive("web") && world.manager.is_alive("db"));
    world.fake().guest_disks.broken.take();
    assert_eq!(world.text("create web"), "guest web was not made");
    assert_eq!(world.told(), ["error: guest web: disk xvdb: serial:a is in use: db writes it"]);
    assert_eq!(world.text("destroy db"), "");
    assert_eq!(world.left(), [""; 0]);
    assert_eq!(world.text("create web"), "guest web is domain 10");
}

/// A guest with disks cannot be started: its disks go before its domain does, and nothing is left.
#[test]
fn a_guest_with_disks_that_cannot_be_started_leaves_none() {
    let mut refused = 0;
    for call in 1.. {
        let mut world = World::planned(&[&format!("{WEB}{DISKS}")]);
        world.fake().guest_disks.held.set(true);
        refuse(&world, call);
        world.begin();
        world.settle();
        let has_disks = !world.fake().guest_disks.list(DomainId(7), "web").is_empty();
        assert_eq!(world.fake().machine.borrow().domains.contains_key(&7), has_disks, "call {call}");
        world.fake().guest_disks.clear(|disks| &disks.held);
        world.settle();
        if world.manager.is_alive("web") {
            break;
        }
        let started = world.told()[0].contains("letting it run");
        assert_eq!(started, has_disks, "call {call}");
        refused += usize::from(started);
        assert_eq!(world.left(), [""; 0], "call {call}");
    }
    assert_eq!(refused, 1);
}

#[test]
fn a_guest_given_up_while_a_disk_is_attached_leaves_nothing() {
    let mut world = World::planned(&[&format!("{WEB}{DISKS}")]);
    world.fake().guest_disks.slow.set(true);
    world.begin();
    world.settle();
    assert!(world.text("list").contains("--p--"), "{}", world.text("list"));
    assert_eq!(world.text("destroy web"), "");
    assert_eq!((world.left(), world.told(), world.manager.failed()), (vec![], vec![], None));
    world.fake().guest_disks.clear(|disks| &disks.slow);
    assert_eq!(world.text("create web"), "guest web is domain 8");
}

/// The number of a domain is not free before its disks are gone: the device may still write the domain's memory.
#[test]
fn a_domain_is_there_until_its_disks_are_gone() {
    for end in ["crash", "destroy web"] {
        let mut world = World::running(&[&format!("{WEB}{DISKS}on_crash = 'restart'\n")]);
        world.fake().guest_disks.held.set(true);
        let asked = (end != "crash").then(|| world.begin_asking(end));
        if asked.is_none() {
            world.shut_down(7, CRASH);
        }
        world.pass(5 * SECOND);
        assert!(world.fake().machine.borrow().domains.contains_key(&7), "{end}");
        assert!(asked.as_ref().is_none_or(|asked| asked.borrow().is_none()), "{end}");
        world.fake().guest_disks.clear(|disks| &disks.held);
        world.pass(5 * SECOND);
        world.pass(SECOND);
        assert!(!world.fake().machine.borrow().domains.contains_key(&7), "{end}");
        assert_eq!(world.manager.is_alive("web"), end == "crash");
    }
}

#[test]
fn disks_come_and_go_while_a_guest_runs() {
    let mut world = World::running(&[WEB, DB]);
    assert_eq!((world.text("block-list"), world.json("block-list web")), ("no disks".into(), json!([])));
    assert_eq!(world.json("block-attach web serial:a,,xvda,w"), json!({"done": "block-attach", "name": "web"}));
    assert_eq!(
        world.text("block-attach web serial:b,,xvda"),
        "guest web: disk xvda: the guest has a disk xvda already"
    );
    let taken = "guest db: disk xvda: serial:a is in use: web writes it";
    assert_eq!(world.text("block-attach db serial:a,,xvda,w"), taken);
    assert_eq!(world.text("block-detach web xvdb"), "guest web: it has no disk xvdb");
    assert_eq!(world.json("block-reset a"), json!({"done": "block-reset", "name": "a"}));
    assert_eq!(world.text("block-reset b"), "no disk has the serial number b");
    world.fake().guest_disks.busy.set(true);
    assert_eq!(world.text("block-detach web xvda"), "guest web: it is used");
    assert_eq!(world.json("block-detach web xvda --force"), json!({"done": "block-detach", "name": "web"}));
    world.fake().guest_disks.busy.set(false);
    assert_eq!(world.text("block-attach 8 serial:a,,xvda,w"), "");
    assert_eq!((world.text("block-detach db xvda"), world.text("block-list")), (String::new(), "no disks".into()));
    for disk in 'a'..='p' {
        assert_eq!(world.text(&format!("block-attach web memory:{}M,,xvd{disk}", u32::from(disk))), "");
    }
    assert_eq!(world.text("block-attach web memory:1M,,xvdq"), "guest web: disk xvdq: a guest has at most 16 disks");
    assert_eq!(world.text("block-attach none memory:1M,,xvda"), "there is no guest none");
    world.shut_down(7, POWEROFF);
    assert_eq!(world.text("block-attach web memory:1M,,xvda"), "guest web has ended");
    assert_eq!(world.text("block-list"), "no disks");
}

/// A device that does not answer holds up its own guest, not the ends of others and not the prompt.
#[test]
fn a_device_that_does_not_answer_holds_up_nobody_else() {
    for end in ["crash", "destroy web"] {
        let mut world = World::running(&[&format!("{WEB}{DISKS}on_crash = 'restart'\n"), DB]);
        world.fake().guest_disks.held.set(true);
        let waits = "guest web has ended, and is destroyed once its devices are removed";
        if end == "crash" {
            world.shut_down(7, CRASH);
            world.pass(11 * SECOND);
            assert_eq!(world.told(), [waits]);
        } else {
            let asked = world.begin_asking(end);
            world.settle();
            world.pass(11 * SECOND);
            assert_eq!(asked.take().unwrap().unwrap_err().to_string(), waits);
        }
        assert_eq!((world.text("create web"), world.text("destroy web")), (waits.into(), waits.into()));
        assert_eq!(world.text("rename web shop"), "guest web is being made or ended; try again");
        assert_eq!(world.text("pause web"), "guest web has ended");
        assert!(!world.manager.is_alive("web") && !world.manager.all_ended());
        assert!(world.fake().machine.borrow().domains.contains_key(&7), "its memory may still be written");
        world.shut_down(8, POWEROFF);
        assert!(world.told().iter().any(|line| line.contains("guest db (domain 8) powered off")));
        world.fake().guest_disks.clear(|disks| &disks.held);
        world.fake().guest_disks.forget(DomainId(7));
        world.pass(SECOND);
        world.pass(SECOND);
        assert!(!world.fake().machine.borrow().domains.contains_key(&7), "{end}");
        assert_eq!(world.manager.is_alive("web"), end == "crash");
        if end == "crash" {
            assert_eq!(world.text("domid web"), "9");
            assert_eq!(world.text("destroy web"), "");
        }
        assert_eq!((world.left(), world.manager.all_ended()), (vec![], true), "{end}");
    }
}

#[test]
fn a_detachment_is_not_waited_for_for_ever() {
    let mut world = World::running(&[&format!("{WEB}{DISKS}")]);
    world.fake().guest_disks.slow.set(true);
    let asked = world.begin_asking("block-detach web xvda --force");
    world.settle();
    world.pass(21 * SECOND);
    let why = "guest web: the device of the disk has not answered; the disk goes when it does";
    assert_eq!(asked.take().unwrap().unwrap_err().to_string(), why);
}
